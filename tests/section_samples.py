"""Sections for tests: small ones, a comparison, and the format written a second time, by hand."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np

from pyinfer.gguf_file import open_gguf
from pyinfer.section import Entry, Section, model_hash, read_section


def load(path: Path) -> Section | None:
    with open_gguf(path) as file:
        return read_section(file)


def one(number: int, length: int = 5) -> Section:
    return Section({"e": Entry({"n": number}, {"a": np.full(length, number, np.int32)})})


def same(found: Section | None, entries: dict[str, Entry]) -> bool:
    assert found is not None and list(found.entries) == list(entries)
    for name, entry in entries.items():
        other = found.entries[name]
        assert other.info == entry.info and list(other.arrays) == list(entry.arrays)
        for key, array in entry.arrays.items():
            assert other.arrays[key].dtype == array.dtype.newbyteorder("=")
            assert other.arrays[key].shape == array.shape
            assert other.arrays[key].tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes()
    return True


def raw_section(text: bytes, body: bytes, model: bytes, sequence: int = 1, version: int = 1, **lies) -> bytes:
    """The bytes of a section as docs/placement.md has them, its checksums right, `lies` in its header."""
    nbytes = 64 + len(text) + -len(text) % 32 + len(body) + 32
    head = struct.pack(
        "<8sIIQQ16sQI",
        b"PYINFER>",
        version,
        0,
        sequence,
        lies.get("nbytes", nbytes),
        model,
        lies.get("directory", len(text)),
        0,
    )
    made = head + struct.pack("<I", zlib.crc32(head)) + text + bytes(-len(text) % 32) + body
    made += struct.pack("<QQI", lies.get("nbytes", nbytes), sequence, version)
    return made + struct.pack("<I", zlib.crc32(made)) + b"<PYINFER"


def append(path: Path, data: bytes) -> None:
    with open(path, "ab") as file:
        file.write(data)


def hash_bytes(path: Path) -> bytes:
    with open_gguf(path) as file:
        return bytes.fromhex(model_hash(file))
