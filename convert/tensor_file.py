"""A file of tensors that are read where they lie: name, type, shape, place; mapped into memory, never copied.

Pages of what was read before are given back at the next read, so that a conversion needs the memory of one
tensor, whatever the size of the file; a caller that still holds the older array sees the disk read again.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from pyinfer.errors import CapacityError, FormatError, InputError, ModelNotFoundError, UnsupportedError
from pyinfer.gguf_metadata import quoted

MAX_DIMENSIONS = 8

# Names of element types as safetensors writes them: bits, and how NumPy reads them. BF16 stays raw bits.
DTYPES: dict[str, tuple[int, np.dtype | None]] = {
    "BOOL": (8, np.dtype("?")),
    "U8": (8, np.dtype("u1")),
    "I8": (8, np.dtype("i1")),
    "U16": (16, np.dtype("<u2")),
    "I16": (16, np.dtype("<i2")),
    "F16": (16, np.dtype("<f2")),
    "BF16": (16, np.dtype("<u2")),
    "U32": (32, np.dtype("<u4")),
    "I32": (32, np.dtype("<i4")),
    "F32": (32, np.dtype("<f4")),
    "U64": (64, np.dtype("<u8")),
    "I64": (64, np.dtype("<i8")),
    "F64": (64, np.dtype("<f8")),
    "C64": (64, np.dtype("<c8")),
    # Known sizes, so that the other tensors of a file can be read.
    "F4": (4, None),
    "F6_E2M3": (6, None),
    "F6_E3M2": (6, None),
    "F8_E4M3": (8, None),
    "F8_E5M2": (8, None),
    "F8_E8M0": (8, None),
    "F8_E4M3FNUZ": (8, None),
    "F8_E5M2FNUZ": (8, None),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor: `start` is its first byte in the file, `shape` is in NumPy's order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int


def is_shape(value: object) -> bool:
    """Whether a value out of a file is a list of counts whose product a file could have."""
    if not isinstance(value, (list, tuple)) or len(value) > MAX_DIMENSIONS:
        return False
    # Zeros count as one: NumPy refuses the rest of an absurd shape also when it has no elements.
    return (
        all(type(each) is int and each >= 0 for each in value)
        and prod(max(each, 1) for each in value) < 1 << 60
    )


def stored_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor; those of less than a byte per element are packed."""
    return -(-prod(shape) * DTYPES[dtype][0] // 8)


class TensorFile:
    """An open file of tensors. tensors : by name, in the order of the file."""

    def __init__(self, path: Path, file_map: mmap.mmap, tensors: dict[str, StoredTensor]):
        self.path = path
        self.tensors = tensors
        self._map = file_map
        self._shown = (0, 0)  # bytes of the latest read

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or some of its rows (first dimension, no step), mapped and read-only.

        F16, F32, integers and BOOL as NumPy has them; BF16 as uint16 bits; F64 as a float32 copy.
        raises UnsupportedError for a type that NumPy cannot express
        """
        tensor = self.tensors[name]
        dtype = DTYPES[tensor.dtype][1]
        if dtype is None:
            raise UnsupportedError(
                f"{self.path.name}: tensor {quoted(name)} is {tensor.dtype}, expected F32, F16 or BF16; "
                "convert from the model's original, unquantized checkpoint"
            )
        start, shape = tensor.start, tensor.shape
        if rows is not None:
            first, last, step = rows.indices(shape[0]) if shape else (0, 0, 0)
            if step != 1:
                raise InputError(
                    f"{quoted(name)} of shape {list(shape)}: rows are {rows}, expected a plain range"
                )
            shape = (max(last - first, 0), *shape[1:])
            start += first * prod(shape[1:]) * dtype.itemsize
        count = prod(shape)
        if count == 0:
            return np.zeros(shape, np.float32 if tensor.dtype == "F64" else dtype)
        self.give_back(start, start + count * dtype.itemsize)
        array = np.frombuffer(self._map, dtype, count, start).reshape(shape)
        if tensor.dtype == "F64":
            with np.errstate(over="ignore"):  # infinite weights are refused when they are written
                return array.astype(np.float32)
        # Kernels expect aligned elements; old writers did not pad their headers.
        return array if start % dtype.itemsize == 0 else array.copy()

    def give_back(self, start: int = 0, stop: int = 0) -> None:
        """Give back the pages of the latest read, unless it lies within the next one, from start to stop."""
        shown, self._shown = self._shown, (start, stop)
        if start <= shown[0] and shown[1] <= stop:
            return
        if not hasattr(mmap.mmap, "madvise") or not hasattr(mmap, "MADV_DONTNEED"):
            return
        first = shown[0] // mmap.PAGESIZE * mmap.PAGESIZE
        # Without the last page, which may hold the beginning of this read.
        length = shown[1] // mmap.PAGESIZE * mmap.PAGESIZE - first
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, first, length)

    def close(self) -> None:
        # An array that is still used keeps its map open; both go together later.
        with contextlib.suppress(BufferError):
            self._map.close()


def map_file(path: Path, expected: str) -> mmap.mmap:
    """Map a whole file for reading; `expected` says in errors what it should be."""
    try:
        # Opening a pipe would wait for its other end; an empty file cannot be mapped.
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            found = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise FormatError(f"{path}: this is {found}, expected {expected}")
        if status.st_size == 0:
            raise FormatError(f"{path.name}: the file is empty, expected {expected}; fetch it again")
        with open(path, "rb") as file:
            file_map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file, expected {expected}") from None
    except (OverflowError, MemoryError) as error:
        raise CapacityError(f"{path.name}: the file cannot be mapped into memory ({error})") from None
    except OSError as error:
        raise ModelNotFoundError(f"{path}: the file cannot be opened ({error.strerror or error})") from None
    if file_map[:23] == b"version https://git-lfs":
        file_map.close()
        raise FormatError(
            f"{path.name}: this is a Git LFS pointer, expected {expected}; fetch it with `git lfs pull`"
        )
    return file_map
