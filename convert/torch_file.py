"""Files of torch.save (pytorch_model.bin, *.pt): a zip archive with one pickle and one member per storage, or
the format before that, which torch_legacy reads.

The pickle is read by torch_pickle, which executes nothing; the tensors are mapped where they lie, since
torch stores its members uncompressed.

Source: torch.serialization (the zip format of torch 1.6 and later).
"""

from __future__ import annotations

import io
import mmap
import zipfile
from math import prod
from pathlib import Path

from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.gguf_metadata import quoted
from pyinfer_convert.tensor_file import DTYPES, StoredTensor, TensorFile, is_shape, map_file, stored_bytes
from pyinfer_convert.torch_legacy import Legacy, is_legacy
from pyinfer_convert.torch_pickle import MAX_PICKLE_BYTES, Rebuilt, Storage, read_pickle

_MAX_DIRECTORY_BYTES = 64 << 20
_LOCAL_HEADER_BYTES = 30
_SAVE_AGAIN = "load it with torch and save it as safetensors"


def open_torch_file(path: Path) -> TensorFile:
    """Open a file of torch.save that holds a tensor, or a dictionary of tensors by name.

    A bare tensor gets the name "". What is not a tensor in the dictionary is left out.
    raises FormatError, UnsupportedError (refused globals by module and name), ModelNotFoundError
    """
    file_map = map_file(path, "a file of torch.save")
    try:
        kind = Legacy if is_legacy(file_map[:32]) else _Archive
        return TensorFile(path, file_map, _tensors(kind(path.name, file_map)))
    except BaseException:
        file_map.close()
        raise


class _MapReader(io.RawIOBase):
    """The map as zipfile reads it, refusing to copy a directory of absurd size."""

    def __init__(self, file_map: mmap.mmap):
        self.map, self.at = file_map, 0

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self.at = offset + (0, self.at, len(self.map))[whence]
        if self.at < 0:
            raise ValueError(f"a place before the file's beginning ({self.at})")
        return self.at

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> bytes:
        stop = len(self.map) if size < 0 else min(self.at + size, len(self.map))
        if stop - self.at > _MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {stop - self.at} bytes")
        data = self.map[self.at : stop]
        self.at = max(self.at, stop)
        return data


class _Archive:
    def __init__(self, file: str, file_map: mmap.mmap):
        self.file, self.map = file, file_map
        if file_map[:4] != b"PK\x03\x04":
            raise FormatError(f"{file}: begins with {file_map[:4]!r}, expected a zip archive of torch.save")
        try:
            members = zipfile.ZipFile(_MapReader(file_map)).infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
            raise FormatError(
                f"{file}: the zip archive cannot be read ({error}); it may be cut off, fetch it again"
            ) from None
        pickles = [each.filename for each in members if each.filename.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise FormatError(f"{file}: the archive has {len(pickles)} members data.pkl, expected one")
        self.folder = pickles[0].removesuffix("data.pkl")
        self.members = {each.filename: each for each in members}
        order = self.folder + "byteorder"
        if order in self.members and self._content(order, 64) != b"little":
            raise UnsupportedError(f"{self.file}: big endian, expected a little-endian file; {_SAVE_AGAIN}")
        data = self._content(self.folder + "data.pkl", MAX_PICKLE_BYTES)
        self.found = read_pickle(data, f"{self.file}: data.pkl")

    def place(self, storage: Storage, where: str) -> int:
        """First byte of a storage, all of which is in the file; `where` begins the error."""
        start, nbytes = self._place(self.folder + "data/" + storage.key, where)
        expected = storage.elements * DTYPES[storage.dtype][0] // 8
        if nbytes != expected:
            raise FormatError(
                f"{where}: its storage data/{quoted(storage.key)} has {nbytes} bytes, "
                f"expected {expected} ({storage.elements} x {storage.dtype})"
            )
        return start

    def _content(self, member: str, most_bytes: int) -> bytes:
        start, nbytes = self._place(member, f"{self.file}: {quoted(member)}")
        if nbytes > most_bytes:
            raise FormatError(
                f"{self.file}: {quoted(member)} has {nbytes} bytes, expected at most {most_bytes}"
            )
        return self.map[start : start + nbytes]

    def _place(self, member: str, where: str) -> tuple[int, int]:
        """(first byte in the file, bytes) of a member, which must be stored as it is."""
        info = self.members.get(member)
        if info is None:
            raise FormatError(f"{where}: the archive has no member {quoted(member)}; fetch the file again")
        if (
            info.compress_type != zipfile.ZIP_STORED
            or info.flag_bits & 1
            or info.compress_size != info.file_size
        ):
            raise UnsupportedError(
                f"{where}: member {quoted(member)} is compressed or encrypted ({info.compress_size} bytes "
                f"become {info.file_size}), expected it stored as torch.save does; {_SAVE_AGAIN}"
            )
        head = self.map[max(info.header_offset, 0) : max(info.header_offset, 0) + _LOCAL_HEADER_BYTES]
        if len(head) < _LOCAL_HEADER_BYTES or head[:4] != b"PK\x03\x04":
            raise FormatError(
                f"{where}: member {quoted(member)} is not where the archive says; fetch it again"
            )
        names_bytes = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        start = info.header_offset + _LOCAL_HEADER_BYTES + names_bytes
        if start + info.file_size > len(self.map):
            raise FormatError(
                f"{where}: member {quoted(member)} ends at byte {start + info.file_size}, but the file has "
                f"{len(self.map)} bytes; it was cut off, fetch it again"
            )
        return start, info.file_size


def _tensors(file: _Archive | Legacy) -> dict[str, StoredTensor]:
    found = file.found
    if isinstance(found, Rebuilt):
        found = {"": found}
    if not isinstance(found, dict):
        raise FormatError(
            f"{file.file}: holds a {type(found).__name__}, expected a dictionary of tensors; {_SAVE_AGAIN}"
        )
    rebuilt = {name: each for name, each in found.items() if isinstance(each, Rebuilt)}
    for name in rebuilt:
        if type(name) is not str:
            raise FormatError(f"{file.file}: a tensor's name is {_shown(name)}, expected a text")
    return {name: _tensor(file, name, each) for name, each in rebuilt.items()}


def _tensor(file: _Archive | Legacy, name: str, tensor: Rebuilt) -> StoredTensor:
    where = f"{file.file}: tensor {quoted(name)}"
    shape, stride, offset, storage = tensor.shape, tensor.stride, tensor.offset, tensor.storage
    if not isinstance(shape, tuple) or not is_shape(shape):
        raise FormatError(f"{where} has shape {_shown(shape)}, expected whole numbers")
    if type(offset) is not int or offset < 0:
        raise FormatError(f"{where} has offset {_shown(offset)}, expected a whole number")
    steps = [prod(shape[number + 1 :]) for number in range(len(shape))]
    if (
        not isinstance(stride, tuple)
        or len(stride) != len(shape)
        or any(
            size > 1 and 0 not in shape and found != step for size, found, step in zip(shape, stride, steps)
        )
    ):
        raise UnsupportedError(
            f"{where} of shape {list(shape)} has strides {_shown(stride)}, expected {steps}: "
            f"its elements do not follow one another; {_SAVE_AGAIN}"
        )
    start = file.place(storage, where)
    itemsize = DTYPES[storage.dtype][0] // 8
    tensor_bytes = stored_bytes(storage.dtype, shape)
    last = offset + tensor_bytes // itemsize
    if last > storage.elements:
        raise FormatError(
            f"{where} of shape {list(shape)} takes elements {offset} to {last} of its storage, "
            f"which has {storage.elements}"
        )
    return StoredTensor(name, storage.dtype, shape, start + offset * itemsize, tensor_bytes)


def _shown(value: object) -> str:
    """A value of the pickle for an error; nested ones only by type, as writing them out may take forever."""
    flat = isinstance(value, tuple) and all(type(each) is int for each in value)
    return str(value)[:80] if flat or type(value) in (int, str) else f"a {type(value).__name__}"
