"""Open a GGUF file: typed metadata and memory-mapped tensors, of one file or of all parts of a split one.

Maps are read-only: a private writable map of a model larger than the memory is refused by some systems.

Source: the GGUF specification; the split.* keys are those of llama.cpp's gguf-split.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import re
import stat
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from pyinfer import names
from pyinfer.errors import CapacityError, FormatError, ModelNotFoundError
from pyinfer.gguf_metadata import Header, TensorInfo, quoted, read_header
from pyinfer.names import GGMLType

_PART_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass(frozen=True, eq=False)
class Tensor:
    """One tensor as on disk: `shape` in ggml order (columns first), `mapped` its uint8 [nbytes].

    whole, index : of a part, the tensor that it is rows of, and which
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    mapped: np.ndarray
    whole: Tensor | None = None
    index: np.ndarray | None = None

    @property
    def data(self) -> np.ndarray:
        """uint8 [nbytes]: the mapped file, or for a part a copy, made each time."""
        if self.index is None or self.whole is None:
            return self.mapped
        return self.mapped.reshape(self.whole._last, -1)[self.index].reshape(-1)

    @property
    def columns(self) -> int:
        return self.shape[0]

    @property
    def rows(self) -> int:
        """The product of all dimensions but the first."""
        return prod(self.shape[1:])

    @property
    def nbytes(self) -> int:
        n_bytes = self.mapped.size
        return n_bytes if self.whole is None else n_bytes // self.whole._last * self.shape[-1]

    @property
    def _last(self) -> int:
        """The last dimension above 1: rows of a matrix, elements of a vector."""
        return next((size for size in reversed(self.shape) if size != 1), 1)

    def part(self, label: str, index: np.ndarray) -> Tensor:
        """These rows (or these elements of a vector) as a tensor, which has no bytes of its own."""
        shape = self.shape
        while len(shape) > 1 and shape[-1] == 1:
            shape = shape[:-1]
        shape = (*shape[:-1], len(index))
        return Tensor(f"{self.name}[{label}]", shape, self.type, self.mapped, self, index)


@dataclass(frozen=True)
class Body:
    """Where the `tensors` of one part lie: bytes `begin` to `end` of its file, padded to `alignment`."""

    path: Path
    tensors: list[TensorInfo]
    begin: int
    end: int
    alignment: int


class GGUFFile:
    """An open GGUF file.

    path : the file, or the first part of a split one;  version : 2 or 3;  file_bytes : of all parts together
    metadata : scalars as Python values, arrays of numbers as NumPy arrays, arrays of strings as list[str]
    tensors : by name, in the order of the file;  powerinfer : a file of PowerInfer (magic PWRI)
    bodies : one for each part
    """

    def __init__(self, parts: list[_Part]):
        self.path = parts[0].path
        self.version = parts[0].header.version
        self.powerinfer = parts[0].header.powerinfer
        self.metadata = parts[0].header.metadata
        self.file_bytes = sum(part.file_bytes for part in parts)
        self.bodies = [part.body for part in parts]
        self.tensors: dict[str, Tensor] = {}
        self._places: dict[str, tuple[mmap.mmap, int]] = {}
        self._maps = [part.map for part in parts]
        for part in parts:
            data = np.frombuffer(part.map, np.uint8)
            for info in part.header.tensors:
                mapped = data[info.start : info.start + info.nbytes]
                self.tensors[info.name] = Tensor(info.name, info.shape, info.type, mapped)
                self._places[info.name] = (part.map, info.start)

    @property
    def architecture(self) -> str:
        return self.require(names.ARCHITECTURE, str)

    def get(self, key: str, default: Any = None, kind: type | tuple[type, ...] = object) -> Any:
        """The value of a metadata key, or `default`; `{arch}` in a key stands for the architecture.

        raises FormatError when the value is not of type `kind`. A bool does not pass as an int, an int passes
        as a float.
        """
        if "{arch}" in key:
            key = names.key(key, self.architecture)
        if key not in self.metadata:
            return default
        value = self.metadata[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if float in kinds and type(value) is int:
            return float(value)
        if not isinstance(value, kinds) or (
            isinstance(value, bool) and bool not in kinds and object not in kinds
        ):
            expected = " or ".join(each.__name__ for each in kinds)
            raise FormatError(
                f"{self.path.name}: metadata key {quoted(key)} holds a value of type {type(value).__name__}, "
                f"expected {expected}"
            )
        return value

    def require(self, key: str, kind: type | tuple[type, ...] = object) -> Any:
        """As `get`, but a missing key raises FormatError."""
        missing = object()
        value = self.get(key, missing, kind)
        if value is missing:
            filled = names.key(key, self.architecture) if "{arch}" in key else key
            raise FormatError(f"{self.path.name}: metadata key {filled} is missing, expected in every model")
        return value

    def drop_pages(self, tensor: Tensor) -> None:
        """Tell the system that a tensor's mapped pages are not needed now; the next access reads the disk."""
        if not hasattr(mmap.mmap, "madvise") or not hasattr(mmap, "MADV_DONTNEED"):
            return
        tensor = tensor.whole or tensor
        if self.tensors.get(tensor.name) is not tensor:
            return
        file_map, start = self._places[tensor.name]
        first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
        stop = (start + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if stop > first:
            file_map.madvise(mmap.MADV_DONTNEED, first, stop - first)

    def close(self) -> None:
        """Forget the tensors and unmap the files; where a caller holds an array, the map goes with it."""
        self.tensors = {}
        self._places = {}
        maps, self._maps = self._maps, []
        for file_map in maps:
            _close(file_map)

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


@dataclass(frozen=True)
class _Part:
    path: Path
    map: mmap.mmap
    header: Header

    @property
    def file_bytes(self) -> int:
        return len(self.map)

    @property
    def body(self) -> Body:
        head = self.header
        begin = min((info.start for info in head.tensors), default=head.data_end)
        return Body(self.path, head.tensors, begin, head.data_end, head.alignment)


def open_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open a model; given any part of a split one, all of its parts.

    raises ModelNotFoundError (no such file, a missing part), FormatError, UnsupportedError, CapacityError

    >>> with open_gguf("model.gguf") as file:  # doctest: +SKIP
    ...     file.architecture, file.tensors["token_embd.weight"].shape
    ('llama', (576, 49152))
    """
    parts: list[_Part] = []
    try:
        parts.append(_open_part(Path(path)))
        count = _split_number(parts[0], names.SPLIT_COUNT, 1)
        if count > 1:
            _open_others(parts, count)
    except BaseException:
        for part in parts:
            _close(part.map)
        raise
    return GGUFFile(parts)


def _open_others(parts: list[_Part], count: int) -> None:
    """Add the missing parts to `parts`, which holds one of them, and bring all into order."""
    given = parts[0]
    number = _split_number(given, names.SPLIT_NO, 0)
    match = _PART_NAME.fullmatch(given.path.name)
    if match is None or int(match["count"]) != count or int(match["number"]) != number + 1:
        raise FormatError(
            f"{given.path.name}: holds part {number + 1} of {count} of a model, "
            f"expected a name that ends in -{number + 1:05d}-of-{count:05d}.gguf"
        )
    for index in range(count):
        if index == number:
            continue
        part = _open_part(given.path.with_name(f"{match['stem']}-{index + 1:05d}-of-{count:05d}.gguf"))
        parts.append(part)
        found = _split_number(part, names.SPLIT_NO, 0), _split_number(part, names.SPLIT_COUNT, 1)
        if found != (index, count):
            raise FormatError(
                f"{part.path.name}: holds part {found[0] + 1} of {found[1]} of a model, "
                f"expected part {index + 1} of {count}"
            )
    parts.sort(key=lambda part: _split_number(part, names.SPLIT_NO, 0))
    _check_whole(parts)


def _check_whole(parts: list[_Part]) -> None:
    owner: dict[str, str] = {}
    for part in parts:
        for info in part.header.tensors:
            if info.name in owner:
                raise FormatError(
                    f"{part.path.name}: tensor {quoted(info.name)} is in {owner[info.name]} too"
                )
            owner[info.name] = part.path.name
    total = _split_number(parts[0], names.SPLIT_TENSORS_COUNT, len(owner))
    if total != len(owner):
        raise FormatError(
            f"{parts[0].path.name}: {names.SPLIT_TENSORS_COUNT} is {total}, "
            f"expected {len(owner)}, the number of tensors in all {len(parts)} parts"
        )


def _split_number(part: _Part, key: str, default: int) -> int:
    value = part.header.metadata.get(key, default)
    if type(value) is not int or value < 0:
        raise FormatError(f"{part.path.name}: metadata key {key} is not a count, expected a whole number")
    return value


def _open_part(path: Path) -> _Part:
    file_map = _map(path)
    try:
        return _Part(path, file_map, read_header(file_map, path.name))
    except BaseException:
        _close(file_map)
        raise


def _map(path: Path) -> mmap.mmap:
    try:
        # Opening a pipe would wait for its other end; an empty file cannot be mapped.
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            found = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise FormatError(f"{path}: this is {found}, expected a GGUF file")
        if status.st_size == 0:
            raise FormatError(f"{path.name}: the file is empty, expected a GGUF file")
        with open(path, "rb") as file:
            return _map_open(path, file)
    except FileNotFoundError:
        raise ModelNotFoundError(f"{path}: no such file, expected a GGUF file") from None
    except (OSError, ValueError) as error:
        if isinstance(error, FormatError):
            raise
        reason = error.strerror if isinstance(error, OSError) else error
        raise ModelNotFoundError(f"{path}: the file cannot be opened ({reason})") from None


def _map_open(path: Path, file: BinaryIO) -> mmap.mmap:
    try:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, OverflowError, MemoryError) as error:
        raise CapacityError(f"{path.name}: the file cannot be mapped into memory ({error})") from None


def _close(file_map: mmap.mmap) -> None:
    # An array that is still used keeps its map open; both go together later.
    with contextlib.suppress(BufferError):
        file_map.close()
