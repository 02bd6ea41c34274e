"""The placement section as bytes: header, directory (JSON), arrays, footer; see docs/placement.md.

Nothing here knows what the entries mean, or where in a file the bytes stand. Bytes come from strangers: every
length is compared with what is there before anything is allocated.
"""

from __future__ import annotations

import json
import math
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pyinfer.errors import FormatError, InputError

VERSION = 1
ALIGNMENT = 32  # of the section in the file, and of everything in it
MAGIC, END_MAGIC = b"PYINFER>", b"<PYINFER"
# magic, version, reserved, sequence, length, hash of the model, directory bytes, reserved, crc32 before it
_HEADER = struct.Struct("<8sIIQQ16sQII")
# length, sequence, version, crc32 of the section up to here, magic
_FOOTER = struct.Struct("<QQII8s")
HEADER_BYTES, FOOTER_BYTES, HASH_BYTES = _HEADER.size, _FOOTER.size, 16
_TYPES = {
    np.dtype(name).name: np.dtype(name).newbyteorder("<")
    for name in ("b1", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8")
}
MOST_BYTES = 256 << 20  # of a section: it is read as a whole; one of 80 layers x 28672 neurons has some 40 MB
_MOST_DIRECTORY_BYTES = 16 << 20
_MOST_DIMENSIONS, _MOST_DEPTH, _MOST_NAME = 8, 16, 200
_MOST_DIGITS = 300  # of an integer in an info, so that it is a float64, too


@dataclass(frozen=True, eq=False)
class Entry:
    """One thing in a section. info : what JSON holds;  arrays : of bools, integers or floats, any shape."""

    info: dict[str, Any] = field(default_factory=dict)
    arrays: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Section:
    """Entries by name, and the version of the format that they were stored in."""

    entries: dict[str, Entry] = field(default_factory=dict)
    version: int = VERSION


@dataclass(frozen=True)
class Header:
    """What the first 64 bytes say: `nbytes` of the whole section, the hash of its model, how new it is."""

    version: int
    sequence: int
    nbytes: int
    model: bytes
    directory_bytes: int


def padded(n_bytes: int, alignment: int = ALIGNMENT) -> int:
    return -(-n_bytes // alignment) * alignment


def encode(section: Section, sequence: int, model: bytes) -> bytes:
    """The section's bytes, a multiple of 32, at most MOST_BYTES.

    raises InputError for what the format cannot hold
    """
    directory: dict[str, Any] = {}
    blobs: list[bytes] = []
    at = 0
    for name, entry in section.entries.items():
        _check_name(name)
        arrays = {}
        for key, array in entry.arrays.items():
            _check_name(key)
            if array.dtype.name not in _TYPES or array.ndim > _MOST_DIMENSIONS:
                raise InputError(
                    f"array {key!r} of {name!r} has type {array.dtype} and {array.ndim} dimensions, "
                    f"expected one of {', '.join(_TYPES)} and at most {_MOST_DIMENSIONS}"
                )
            if at + array.nbytes > MOST_BYTES or max(array.shape, default=0) > MOST_BYTES:
                raise InputError(
                    f"array {key!r} of {name!r} has {array.nbytes} bytes in shape {array.shape}, "
                    f"expected at most {MOST_BYTES} bytes in all of a section"
                )
            blob = array.astype(_TYPES[array.dtype.name], copy=False).tobytes()
            arrays[key] = {"type": array.dtype.name, "shape": list(array.shape), "begin": at}
            blobs.append(blob.ljust(padded(len(blob)), b"\0"))
            at += len(blobs[-1])
        directory[name] = {"info": entry.info, "arrays": arrays}
    text = _directory_text(directory)
    body = b"".join([text.ljust(padded(len(text)), b"\0"), *blobs])
    nbytes = HEADER_BYTES + len(body) + FOOTER_BYTES
    if nbytes > MOST_BYTES:
        raise InputError(f"the entries take {nbytes} bytes, expected at most {MOST_BYTES}")
    head = _HEADER.pack(MAGIC, VERSION, 0, sequence, nbytes, model, len(text), 0, 0)[:-4]
    head += struct.pack("<I", zlib.crc32(head))
    foot = _FOOTER.pack(nbytes, sequence, VERSION, 0, b"")[:-12]
    crc = zlib.crc32(foot, zlib.crc32(body, zlib.crc32(head)))
    return b"".join([head, body, foot, struct.pack("<I", crc), END_MAGIC])


def _check_name(name: object) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= _MOST_NAME:
        raise InputError(f"the name {name!r:.100} was given, expected 1 to {_MOST_NAME} characters")


def _directory_text(directory: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(directory, allow_nan=False, separators=(",", ":")).encode("ascii")
        same = json.loads(text, parse_int=_short) == directory and _is_flat(directory, _MOST_DEPTH)
    except (TypeError, ValueError, RecursionError) as error:
        raise InputError(f"the info of an entry cannot be stored: {error}") from None
    if not same:
        raise InputError(
            f"the info of an entry changes when it is stored, expected dicts with text keys, lists, texts, "
            f"finite numbers, bools and None, at most {_MOST_DEPTH - 3} in one another"
        )
    if len(text) > _MOST_DIRECTORY_BYTES:
        raise InputError(
            f"infos take {len(text)} bytes, expected at most {_MOST_DIRECTORY_BYTES}; use an array"
        )
    return text


def _short(word: str) -> int:
    """An integer of JSON. Raises ValueError: Python takes long for long ones, and refuses to print them."""
    if len(word) > _MOST_DIGITS:
        raise ValueError(f"an integer of {len(word)} digits, expected at most {_MOST_DIGITS}")
    return int(word)


def _is_flat(value: object, levels: int) -> bool:
    """Whether no more than so many dicts and lists stand in one another."""
    if isinstance(value, dict):
        return levels > 0 and all(_is_flat(each, levels - 1) for each in value.values())
    return not isinstance(value, list) or (levels > 0 and all(_is_flat(each, levels - 1) for each in value))


def decode_header(data: bytes) -> Header:
    """raises FormatError: what is wrong, without a file name"""
    if len(data) < HEADER_BYTES:
        raise FormatError(f"has {len(data)} bytes of header, expected {HEADER_BYTES}")
    magic, version, _, sequence, nbytes, model, directory_bytes, _, crc = _HEADER.unpack_from(data)
    if magic != MAGIC or crc != zlib.crc32(data[: HEADER_BYTES - 4]):
        raise FormatError("has a header whose checksum is wrong")
    return Header(version, sequence, nbytes, model, directory_bytes)


def decode_footer(data: bytes) -> int | None:
    """The length of the section that ends with these bytes; None where none does."""
    if len(data) < FOOTER_BYTES:
        return None
    nbytes, _, _, _, magic = _FOOTER.unpack(data[-FOOTER_BYTES:])
    return nbytes if magic == END_MAGIC else None


def decode(data: bytearray, header: Header) -> Section:
    """The section of these bytes, all of it; its arrays are views where they can be.

    raises FormatError: what is wrong, without a file name
    """
    nbytes, sequence, version, crc, magic = _FOOTER.unpack(data[-FOOTER_BYTES:])
    if magic != END_MAGIC:
        raise FormatError("has no footer where its header says that it ends")
    body = memoryview(data)[:-12]
    if crc != zlib.crc32(body) or (nbytes, sequence, version) != (len(data), header.sequence, header.version):
        raise FormatError("has a checksum that does not fit its content")
    room = len(data) - HEADER_BYTES - FOOTER_BYTES
    if not 0 < header.directory_bytes <= min(room, _MOST_DIRECTORY_BYTES):
        raise FormatError(
            f"has a directory of {header.directory_bytes} bytes, "
            f"expected 1 to {min(room, _MOST_DIRECTORY_BYTES)}"
        )
    text = bytes(data[HEADER_BYTES : HEADER_BYTES + header.directory_bytes])
    first = HEADER_BYTES + padded(header.directory_bytes)
    return Section(dict(_entries(_parsed(text), data, first)), header.version)


def _parsed(text: bytes) -> dict[str, Any]:
    def finite(word: str) -> float:
        if math.isfinite(number := float(word)):
            return number
        raise ValueError(word)

    try:
        found = json.loads(text.decode("utf-8"), parse_float=finite, parse_constant=finite, parse_int=_short)
    except (ValueError, RecursionError):  # of which UnicodeDecodeError is one
        raise FormatError("has a directory that is not valid JSON") from None
    if not isinstance(found, dict) or not _is_flat(found, _MOST_DEPTH):
        raise FormatError(
            f"has a directory that is no JSON object of at most {_MOST_DEPTH} levels, expected one"
        )
    return found


def _entries(directory: dict[str, Any], data: bytearray, first: int) -> Iterator[tuple[str, Entry]]:
    """Arrays stand one behind the other from byte `first` on: on top of each other they could multiply the
    file's size in memory.
    """
    at, end = first, len(data) - FOOTER_BYTES
    for name, entry in directory.items():
        if not isinstance(entry, dict) or not all(isinstance(entry.get(k), dict) for k in ("info", "arrays")):
            raise FormatError(f"has an entry {name!r:.80} without info and arrays")
        arrays = {}
        for key, described in entry["arrays"].items():
            what = f"array {key!r:.80} of entry {name!r:.80}"
            dtype, shape, begin = _described(described, what)
            nbytes = math.prod(shape) * dtype.itemsize
            if begin != at - first or nbytes > end - at:
                raise FormatError(
                    f"has an {what} of {nbytes} bytes at byte {begin} of the arrays, "
                    f"expected it at {at - first} with at most {max(0, end - at)} bytes"
                )
            try:
                values = np.frombuffer(data, dtype, math.prod(shape), at).reshape(shape)
            except (ValueError, OverflowError):  # no elements, and a length that no array has
                raise FormatError(f"has an {what} of shape {shape!r:.80}, which cannot be") from None
            native = dtype.newbyteorder("=")
            arrays[key] = values.view("u1") != 0 if native.kind == "b" else values.astype(native, copy=False)
            at += padded(nbytes)
        yield name, Entry(entry["info"], arrays)


def _described(described: object, what: str) -> tuple[np.dtype, tuple[int, ...], int]:
    if not isinstance(described, Mapping):
        raise FormatError(f"has an {what} that is not described")
    kind, shape, begin = described.get("type"), described.get("shape"), described.get("begin")
    lengths = shape if isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS else [None]
    known = isinstance(kind, str) and kind in _TYPES and type(begin) is int
    # Bounded one by one: the product of eight long ones cannot even be printed.
    if not known or any(type(n) is not int or not 0 <= n <= MOST_BYTES for n in lengths):
        raise FormatError(
            f"has an {what} of type {kind!r:.40} and shape {shape!r:.80}, "
            f"expected one of {', '.join(_TYPES)} and at most {_MOST_DIMENSIONS} lengths up to {MOST_BYTES}"
        )
    return _TYPES[kind], tuple(lengths), begin
