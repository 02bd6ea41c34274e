"""The head of a GGUF file as bytes: metadata and the list of tensors.

Source: the GGUF specification, version 3 (little endian).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from pyinfer import names
from pyinfer.errors import InputError
from pyinfer.names import BLOCK, GGMLType, ValueType

VERSION = 3
_OF_DTYPE = {
    "u1": ValueType.UINT8,
    "i1": ValueType.INT8,
    "u2": ValueType.UINT16,
    "i2": ValueType.INT16,
    "u4": ValueType.UINT32,
    "i4": ValueType.INT32,
    "f4": ValueType.FLOAT32,
    "b1": ValueType.BOOL,
    "u8": ValueType.UINT64,
    "i8": ValueType.INT64,
    "f8": ValueType.FLOAT64,
}
_BYTES = {
    kind: size
    for size, kinds in {
        1: (ValueType.UINT8, ValueType.INT8, ValueType.BOOL),
        2: (ValueType.UINT16, ValueType.INT16),
        4: (ValueType.UINT32, ValueType.INT32, ValueType.FLOAT32),
        8: (ValueType.UINT64, ValueType.INT64, ValueType.FLOAT64),
    }.items()
    for kind in kinds
}


@dataclass(frozen=True)
class Encoded:
    """A value as it stands in a file, its type in front."""

    data: bytes


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written; `shape` is in NumPy's order."""

    name: str
    shape: tuple[int, ...]
    type: GGMLType

    @property
    def nbytes(self) -> int:
        elements, block_bytes = BLOCK[self.type]
        return prod(self.shape) // elements * block_bytes


def aligned(n_bytes: int, alignment: int) -> int:
    return -(-n_bytes // alignment) * alignment


def header(
    metadata: Mapping[str, object],
    tensors: Iterable[TensorEntry],
    alignment: int = names.DEFAULT_ALIGNMENT,
    magic: bytes = names.MAGIC,
) -> bytes:
    """Everything in front of the tensor data, padded; the tensors follow in order, each padded."""
    entries = list(tensors)
    out = bytearray(magic + struct.pack("<IQQ", VERSION, len(entries), len(metadata)))
    for key, value in metadata.items():
        out += _text(key) + encode(key, value)
    offset = 0
    for entry in entries:
        shape = tuple(reversed(entry.shape))
        out += _text(entry.name)
        out += struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, entry.type, offset)
        offset += aligned(entry.nbytes, alignment)
    return bytes(out.ljust(aligned(len(out), alignment), b"\0"))


def encode(key: str, value: object) -> bytes:
    """Type and value. int becomes UINT32 where it fits (in lists INT32), float FLOAT32; arrays stay."""
    if isinstance(value, Encoded):
        return value.data
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bool):
        return struct.pack("<I?", ValueType.BOOL, value)
    if isinstance(value, int):
        kind, code = _integer(value)
        return struct.pack(f"<I{code}", kind, value)
    if isinstance(value, float):
        return struct.pack("<If", ValueType.FLOAT32, value)
    if isinstance(value, str):
        return struct.pack("<I", ValueType.STRING) + _text(value)
    if isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value):
        head = struct.pack("<IIQ", ValueType.ARRAY, ValueType.STRING, len(value))
        return head + b"".join(_text(each) for each in value)
    return _array(key, value)


def _array(key: str, value: object) -> bytes:
    if isinstance(value, (list, tuple)):
        value = np.array(value)
        if value.dtype == np.float64:
            value = value.astype(np.float32)
        elif value.dtype == np.int64:
            value = value.astype(np.int32) if np.abs(value).max(initial=0) < 1 << 31 else value
    if not isinstance(value, np.ndarray) or value.ndim != 1 or value.dtype.str[1:] not in _OF_DTYPE:
        raise InputError(
            f"{key}: a {type(value).__name__} cannot be written, expected a number, text or list"
        )
    head = struct.pack("<IIQ", ValueType.ARRAY, _OF_DTYPE[value.dtype.str[1:]], len(value))
    return head + value.astype(value.dtype.newbyteorder("<")).tobytes()


def _integer(value: int) -> tuple[ValueType, str]:
    if 0 <= value < 1 << 32:
        return ValueType.UINT32, "I"
    if value >= 0:
        return ValueType.UINT64, "Q"
    return (ValueType.INT32, "i") if value >= -1 << 31 else (ValueType.INT64, "q")


def _text(value: str) -> bytes:
    data = value.encode("utf-8")
    return struct.pack("<Q", len(data)) + data


def read_encoded(path: Path) -> dict[str, Encoded]:
    """The metadata of a GGUF file (one that was opened and checked before) with its types, as it is."""
    with open(path, "rb") as file:
        _, _, _, count = struct.unpack("<IIQQ", file.read(24))
        found = {}
        for _ in range(count):
            key = _read_text(file).decode("utf-8")
            kind = file.read(4)
            found[key] = Encoded(kind + _read_value(file, struct.unpack("<I", kind)[0]))
        return found


def _read_text(file) -> bytes:
    return file.read(struct.unpack("<Q", file.read(8))[0])


def _read_value(file, kind: int) -> bytes:
    if kind == ValueType.STRING:
        size = file.read(8)
        return size + file.read(struct.unpack("<Q", size)[0])
    if kind != ValueType.ARRAY:
        return file.read(_BYTES[ValueType(kind)])
    head = file.read(12)
    of, count = struct.unpack("<IQ", head)
    if of in _BYTES:
        return head + file.read(count * _BYTES[ValueType(of)])
    return head + b"".join(_read_value(file, of) for _ in range(count))
