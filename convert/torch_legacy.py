"""Files of torch.save before torch 1.6, and of those who still ask for its format: five pickles, then the
storages one after the other.

The pickles are a magic number, the version of the format, what the writing machine was like, the object, and
the keys of the storages in the order in which they follow. Each storage begins with its number of elements.

Source: torch.serialization (_legacy_save).
"""

from __future__ import annotations

import mmap

from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.gguf_metadata import quoted
from pyinfer_convert.tensor_file import DTYPES
from pyinfer_convert.torch_pickle import MAX_PICKLE_BYTES, Storage, read_pickles

MAGIC = bytes.fromhex("8a0a6cfc9c46f9206aa850192e")  # LONG1 of ten bytes, STOP
_VERSION = 1001
_COUNT_BYTES = 8
_SAVE_AGAIN = "load it with torch and save it as safetensors"


def is_legacy(start: bytes) -> bool:
    """Whether a file that begins with these 32 bytes has this format; later protocols frame the number."""
    return start[:1] == b"\x80" and MAGIC in start


class Legacy:
    """found : what the object is, as `read_pickle` gives it."""

    def __init__(self, file: str, file_map: mmap.mmap) -> None:
        self.file = file
        data = file_map[:MAX_PICKLE_BYTES]
        where = f"{file}: its pickles"
        pickles = read_pickles(data, where, 5)
        _, version, machine, self.found, keys = pickles.values
        if type(version) is not int or version != _VERSION:
            raise UnsupportedError(f"{file}: the format's version is not {_VERSION}; {_SAVE_AGAIN}")
        if not isinstance(machine, dict) or machine.get("little_endian") is not True:
            raise UnsupportedError(f"{file}: big endian, expected a little-endian file; {_SAVE_AGAIN}")
        if not isinstance(keys, list) or not all(type(key) is str for key in keys):
            raise FormatError(f"{where} have no list of storages, expected one; fetch the file again")
        self._storages = pickles.storages
        self._starts: dict[str, int] = {}
        at = pickles.stop
        for key in keys:
            at = self._pass_storage(key, at, file_map)
        if at != len(file_map):
            raise FormatError(
                f"{file}: the file has {len(file_map)} bytes, but its storages end at byte {at}"
            )

    def _pass_storage(self, key: str, at: int, file_map: mmap.mmap) -> int:
        """Note where a storage lies; the place behind it."""
        storage = self._storages.get(key)
        if storage is None or key in self._starts:
            raise FormatError(f"{self.file}: storage {quoted(key)} is listed, but not once in the object")
        start = at + _COUNT_BYTES
        elements = int.from_bytes(file_map[at:start], "little")
        stop = start + storage.elements * DTYPES[storage.dtype][0] // 8
        if stop > len(file_map):
            raise FormatError(
                f"{self.file}: storage {quoted(key)} ends at byte {stop}, but the file has {len(file_map)} "
                "bytes; it was cut off, fetch it again"
            )
        if elements != storage.elements:
            raise FormatError(
                f"{self.file}: storage {quoted(key)} has {elements} elements, expected {storage.elements}"
            )
        self._starts[key] = start
        return stop

    def place(self, storage: Storage, where: str) -> int:
        """First byte of a storage, all of which is in the file; `where` begins the error."""
        if storage.key not in self._starts or storage != self._storages[storage.key]:
            raise FormatError(
                f"{where}: its storage {quoted(storage.key)} is not in the file as {storage.elements} x "
                f"{storage.dtype}; fetch the file again"
            )
        return self._starts[storage.key]
