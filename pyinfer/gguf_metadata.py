"""The head of a GGUF file: key-value metadata and the list of tensors, from bytes that nobody vouches for.

The gguf package makes a NumPy view of every string, which costs seconds for a vocabulary; here one loop over
the bytes does. Every count and length is compared with the bytes that are left before anything is allocated
or sliced, so the memory used is at most a small multiple of the file's size, whatever the file says.

Source: the GGUF specification, versions 2 and 3 (little endian).
"""

from __future__ import annotations

import itertools
import mmap
import struct
from dataclasses import dataclass
from math import prod

import numpy as np

from pyinfer import names
from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.names import BLOCK, GGMLType, ValueType

Buffer = bytes | mmap.mmap

_MAX_KEY_BYTES = 65535
_MAX_ARRAY_DEPTH = 4
# Fewest bytes on disk. Pair: key length, type, value; tensor: name length, shape, type, offset.
_MIN_PAIR_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8

_SCALAR = {
    ValueType.UINT8: struct.Struct("<B"),
    ValueType.INT8: struct.Struct("<b"),
    ValueType.UINT16: struct.Struct("<H"),
    ValueType.INT16: struct.Struct("<h"),
    ValueType.UINT32: struct.Struct("<I"),
    ValueType.INT32: struct.Struct("<i"),
    ValueType.FLOAT32: struct.Struct("<f"),
    ValueType.BOOL: struct.Struct("<?"),
    ValueType.UINT64: struct.Struct("<Q"),
    ValueType.INT64: struct.Struct("<q"),
    ValueType.FLOAT64: struct.Struct("<d"),
}
_DTYPE = {
    ValueType.UINT8: np.dtype("<u1"),
    ValueType.INT8: np.dtype("<i1"),
    ValueType.UINT16: np.dtype("<u2"),
    ValueType.INT16: np.dtype("<i2"),
    ValueType.UINT32: np.dtype("<u4"),
    ValueType.INT32: np.dtype("<i4"),
    ValueType.FLOAT32: np.dtype("<f4"),
    ValueType.BOOL: np.dtype("<u1"),
    ValueType.UINT64: np.dtype("<u8"),
    ValueType.INT64: np.dtype("<i8"),
    ValueType.FLOAT64: np.dtype("<f8"),
}
_U32 = _SCALAR[ValueType.UINT32]
_U64 = _SCALAR[ValueType.UINT64]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: `start` is the byte in the file, `shape` is in ggml order (columns first)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    start: int
    nbytes: int


@dataclass(frozen=True)
class Header:
    """What a GGUF file says in front of its tensor data; `data_end` is the byte behind the last tensor.

    powerinfer : the magic is PWRI, as PowerInfer marks its files (the rest is GGUF)
    """

    version: int
    metadata: dict[str, object]
    tensors: list[TensorInfo]
    alignment: int
    data_end: int
    powerinfer: bool


def read_header(buffer: Buffer, file: str) -> Header:
    """Parse the head of a GGUF file and check every tensor's place.

    buffer : the whole file;  file : its name, for errors
    raises FormatError, UnsupportedError, each with file, place, what was found and what was expected
    """
    version = _check_start(buffer, file)
    cursor = _Cursor(buffer, file, 8)
    tensor_count = cursor.count("the tensor count", _MIN_TENSOR_BYTES)
    pair_count = cursor.count("the metadata count", _MIN_PAIR_BYTES)
    metadata: dict[str, object] = {}
    for _ in range(pair_count):
        start = cursor.offset
        key = cursor.text("a metadata key", _MAX_KEY_BYTES)
        if key in metadata:
            raise FormatError(f"{file}: metadata key {quoted(key)} at byte {start} occurs twice")
        metadata[key] = cursor.value(cursor.u32(key), key, 0)
    alignment = _alignment(metadata, file)
    described = [_describe(cursor) for _ in range(tensor_count)]
    data_start = -(-cursor.offset // alignment) * alignment
    tensors = [_place(entry, data_start, alignment, len(buffer), file) for entry in described]
    _check_distinct(tensors, file)
    data_end = max((info.start + info.nbytes for info in tensors), default=min(data_start, len(buffer)))
    powerinfer = bytes(buffer[:4]) == names.MAGIC_POWERINFER
    return Header(version, metadata, tensors, alignment, data_end, powerinfer)


def quoted(text: str) -> str:
    """A name out of a file as an error may show it: short, on one line."""
    short = text if len(text) <= 80 else text[:77] + "..."
    return short if short.isprintable() and short else ascii(short)


def _check_start(buffer: Buffer, file: str) -> int:
    magic = bytes(buffer[:4])
    if magic not in (names.MAGIC, names.MAGIC_POWERINFER):
        hint = ""
        if bytes(buffer[:23]) == b"version https://git-lfs":
            hint = "; it is a Git LFS pointer, fetch the model itself with `git lfs pull`"
        raise FormatError(f"{file}: byte 0 says {magic!r}, expected {names.MAGIC!r}: not a GGUF file{hint}")
    if len(buffer) < 24:
        raise FormatError(f"{file}: ends at byte {len(buffer)}, expected 24 bytes of GGUF header or more")
    (version,) = _U32.unpack_from(buffer, 4)
    if version in names.VERSIONS:
        return version
    if version == 1:
        raise UnsupportedError(f"{file}: GGUF version 1 is too old, expected 2 or 3; convert the model again")
    if version & 0xFFFF == 0 and version >> 24 in (1, *names.VERSIONS):
        raise UnsupportedError(
            f"{file}: big endian (byte 4 says version {version}), expected a little-endian file"
        )
    if version == 0 or version > 0xFFFF:
        raise FormatError(f"{file}: byte 4 says GGUF version {version}, expected 2 or 3")
    raise UnsupportedError(f"{file}: GGUF version {version} is newer than pyinfer, expected 2 or 3")


def _alignment(metadata: dict[str, object], file: str) -> int:
    alignment = metadata.get(names.ALIGNMENT, names.DEFAULT_ALIGNMENT)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        found = quoted(str(alignment)) if isinstance(alignment, (int, float, str)) else "an array"
        raise FormatError(f"{file}: {names.ALIGNMENT} is {found}, expected a power of two")
    return alignment


@dataclass(frozen=True)
class _Described:
    name: str
    shape: tuple[int, ...]
    type: int
    offset: int


def _describe(cursor: _Cursor) -> _Described:
    name = cursor.text("a tensor name", _MAX_KEY_BYTES)
    dimensions = cursor.u32(name)
    if not 1 <= dimensions <= names.MAX_DIMENSIONS:
        raise FormatError(
            f"{cursor.file}: tensor {quoted(name)} has {dimensions} dimensions at byte {cursor.offset - 4}, "
            f"expected 1 to {names.MAX_DIMENSIONS}"
        )
    shape = tuple(cursor.u64(name) for _ in range(dimensions))
    return _Described(name, shape, cursor.u32(name), cursor.u64(name))


def _place(entry: _Described, data_start: int, alignment: int, file_bytes: int, file: str) -> TensorInfo:
    """Check what a file says about one tensor; Python integers do not overflow, so products are exact."""
    where = f"{file}: tensor {quoted(entry.name)}"
    try:
        kind = GGMLType(entry.type)
    except ValueError:
        raise UnsupportedError(
            f"{where} has type {entry.type}, expected one of ggml's types 0 to {max(GGMLType)}"
        ) from None
    if kind not in BLOCK:
        raise UnsupportedError(f"{where} has type {kind.name}, which ggml withdrew; convert the model again")
    elements, block_bytes = BLOCK[kind]
    if 0 in entry.shape:
        raise FormatError(f"{where} has shape {entry.shape}, expected no dimension of 0")
    if entry.shape[0] % elements:
        raise FormatError(
            f"{where} has {entry.shape[0]} columns, expected whole blocks of {elements} as {kind.name} has"
        )
    if entry.offset % alignment:
        raise FormatError(
            f"{where} has offset {entry.offset}, expected a multiple of {alignment} ({names.ALIGNMENT})"
        )
    nbytes = prod(entry.shape) // elements * block_bytes
    start = data_start + entry.offset
    if start + nbytes > file_bytes:
        raise FormatError(
            f"{where} of shape {entry.shape} and type {kind.name} takes bytes {start} to {start + nbytes}, "
            f"expected to end within the file's {file_bytes} bytes; the file may be cut off"
        )
    return TensorInfo(entry.name, entry.shape, kind, start, nbytes)


def _check_distinct(tensors: list[TensorInfo], file: str) -> None:
    seen: set[str] = set()
    for info in tensors:
        if info.name in seen:
            raise FormatError(f"{file}: tensor {quoted(info.name)} occurs twice")
        seen.add(info.name)
    ordered = sorted(tensors, key=lambda info: info.start)
    for before, after in itertools.pairwise(ordered):
        if after.start < before.start + before.nbytes:
            raise FormatError(
                f"{file}: tensor {quoted(after.name)} starts at byte {after.start}, inside tensor "
                f"{quoted(before.name)}, which ends at byte {before.start + before.nbytes}"
            )


class _Cursor:
    """A place in the file that moves on with every value read; `key` is what an error names."""

    def __init__(self, buffer: Buffer, file: str, offset: int):
        self.buffer = buffer
        self.file = file
        self.offset = offset
        self.end = len(buffer)

    def need(self, nbytes: int, key: str) -> None:
        if nbytes > self.end - self.offset:
            raise FormatError(
                f"{self.file}: {quoted(key)} at byte {self.offset} needs {nbytes} bytes, "
                f"expected at most the {self.end - self.offset} that are left; the file may be cut off"
            )

    def u32(self, key: str) -> int:
        self.need(4, key)
        (value,) = _U32.unpack_from(self.buffer, self.offset)
        self.offset += 4
        return value

    def u64(self, key: str) -> int:
        self.need(8, key)
        (value,) = _U64.unpack_from(self.buffer, self.offset)
        self.offset += 8
        return value

    def count(self, key: str, each_bytes: int) -> int:
        """A number of things that take at least `each_bytes` each."""
        start = self.offset
        number = self.u64(key)
        if number * each_bytes > self.end - self.offset:
            raise FormatError(
                f"{self.file}: {quoted(key)} at byte {start} counts {number}, "
                f"expected at most {(self.end - self.offset) // each_bytes}, for which there are bytes left"
            )
        return number

    def text(self, key: str, limit: int | None = None) -> str:
        start = self.offset
        nbytes = self.u64(key)
        if limit is not None and nbytes > limit:
            raise FormatError(
                f"{self.file}: {key} at byte {start} has {nbytes} bytes, expected at most {limit}"
            )
        self.need(nbytes, key)
        self.offset += nbytes
        try:
            return str(self.buffer[start + 8 : self.offset], "utf-8")
        except UnicodeDecodeError:
            raise self._not_text(key, start) from None

    def value(self, kind: int, key: str, depth: int) -> object:
        if kind == ValueType.STRING:
            return self.text(key)
        if kind == ValueType.ARRAY:
            return self._array(key, depth)
        scalar = _SCALAR.get(kind)  # type: ignore[call-overload]
        if scalar is None:
            raise self._unknown(kind, key)
        self.need(scalar.size, key)
        (value,) = scalar.unpack_from(self.buffer, self.offset)
        self.offset += scalar.size
        return value

    def _array(self, key: str, depth: int) -> object:
        if depth == _MAX_ARRAY_DEPTH:
            raise UnsupportedError(
                f"{self.file}: {quoted(key)} at byte {self.offset} nests arrays, "
                f"expected at most {_MAX_ARRAY_DEPTH} in one another"
            )
        kind = self.u32(key)
        if kind == ValueType.STRING:
            return self._texts(key, self.count(key, 8))
        if kind == ValueType.ARRAY:
            return [self._array(key, depth + 1) for _ in range(self.count(key, 12))]
        dtype = _DTYPE.get(kind)  # type: ignore[call-overload]
        if dtype is None:
            raise self._unknown(kind, key)
        number = self.count(key, dtype.itemsize)
        # A copy: a view would keep the map of the file from closing.
        values = np.frombuffer(self.buffer, dtype, number, self.offset).astype(dtype.newbyteorder("="))
        self.offset += number * dtype.itemsize
        return values != 0 if kind == ValueType.BOOL else values

    def _texts(self, key: str, number: int) -> list[str]:
        # A vocabulary is most of a head's time: this loop calls nothing that can be left out.
        buffer, unpack, start, end = self.buffer, _U64.unpack_from, self.offset, self.end
        texts: list[str] = []
        append = texts.append
        try:
            for _ in range(number):
                first = start + 8
                stop = first + unpack(buffer, start)[0]
                if stop > end:
                    break
                append(str(buffer[first:stop], "utf-8"))
                start = stop
        except struct.error:
            pass
        except UnicodeDecodeError:
            raise self._not_text(f"{key}[{len(texts)}]", start) from None
        self.offset = start
        if len(texts) < number:
            self.text(
                f"{key}[{len(texts)}]"
            )  # raises with the place, as the loop stopped where bytes ran out
        return texts

    def _not_text(self, key: str, start: int) -> FormatError:
        return FormatError(f"{self.file}: {quoted(key)} at byte {start} is not valid UTF-8 text")

    def _unknown(self, kind: int, key: str) -> UnsupportedError:
        return UnsupportedError(
            f"{self.file}: {quoted(key)} at byte {self.offset - 4} has value type {kind}, "
            f"expected 0 to {max(ValueType)}"
        )
