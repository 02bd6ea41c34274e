"""Sections that are damaged, foreign or lies: one sentence each, and the model as it was."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path

import gguf_samples as samples
import pytest
from section_samples import append, hash_bytes, load, one, raw_section, same

from pyinfer import section, section_bytes
from pyinfer.errors import FormatError, InputError
from pyinfer.gguf_file import open_gguf
from pyinfer.section import Entry, Section, body_bytes, read_section, update_section, write_section


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return samples.write_tiny(tmp_path / "model.gguf")


def refused(path: Path, words: str) -> None:
    with pytest.raises(FormatError) as caught:
        load(path)
    said = str(caught.value)
    assert words in said and said.startswith(f"{path.name}: its placement section ") and "\n" not in said
    assert "the model runs without it" in said


def test_every_bit_of_a_section_counts(path: Path) -> None:
    begin = path.stat().st_size
    write_section(path, one(1))
    good = path.read_bytes()
    with open_gguf(path) as file, open(path, "r+b", buffering=0) as handle:
        for place in range(begin, len(good)):
            for bit in range(8):
                handle.seek(place)
                handle.write(bytes([good[place] ^ 1 << bit]))
                with pytest.raises(FormatError, match=r"model.gguf: its placement section .*runs without it"):
                    read_section(file)
            handle.seek(place)
            handle.write(good[place : place + 1])
        assert same(read_section(file), one(1).entries)


def test_every_truncation_is_seen(path: Path) -> None:
    begin = path.stat().st_size
    write_section(path, one(1))
    with open_gguf(path) as file, open(path, "r+b") as handle:
        for length in range(path.stat().st_size - 1, begin, -1):
            handle.truncate(length)
            with pytest.raises(FormatError, match=r"model.gguf: its placement section"):
                read_section(file)
        handle.truncate(begin)
        assert read_section(file) is None


def test_a_damaged_section_is_replaced_on_demand_only(path: Path) -> None:
    body = path.read_bytes()
    write_section(path, one(1))
    good = path.read_bytes()
    for place in range(len(body), len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :])
        with pytest.raises(FormatError, match="placement section"):
            update_section(path, other=Entry())
        write_section(path, one(2))
        assert same(load(path), one(2).entries) and path.stat().st_size == len(good)
    path.write_bytes(good[:-1])
    write_section(path, Section())
    assert path.read_bytes() == body


def test_a_newer_version_is_kept(path: Path) -> None:
    append(path, raw_section(b"?", b"", hash_bytes(path), version=2))
    before = path.read_bytes()
    refused(path, "has format version 2, expected 1; a newer pyinfer wrote it, use that")
    for write in (lambda: write_section(path, one(1)), lambda: update_section(path, e=None)):
        with pytest.raises(FormatError, match="format version 2"):
            write()
    assert path.read_bytes() == before


def test_a_section_of_another_model_is_refused(tmp_path: Path, path: Path) -> None:
    begin = path.stat().st_size
    other = samples.write_sample(tmp_path / "other.gguf")
    write_section(other, one(1))
    with open_gguf(other) as file:
        append(path, other.read_bytes()[body_bytes(file) :])
    refused(
        path, f"belongs to another model (hash {hash_bytes(other).hex()}, expected {hash_bytes(path).hex()})"
    )
    changed = bytearray(other.read_bytes())
    changed[changed.index("n\u00e4me".encode())] ^= 1
    other.write_bytes(changed)
    refused(other, "belongs to another model")
    write_section(path, one(2))
    assert same(load(path), one(2).entries) and path.read_bytes()[begin : begin + 8] == b"PYINFER>"


def test_foreign_bytes_behind_the_tensors_stay(path: Path) -> None:
    body = path.read_bytes()
    for foreign in (b"\x01", b"PYINFERNO", bytes(3000) + b"zip", b"x" * 5000):
        path.write_bytes(body + foreign)
        assert load(path) is None
        for write in (lambda: write_section(path, one(1)), lambda: update_section(path, e=Entry())):
            with pytest.raises(FormatError, match=rf"from byte {len(body)} on, are none that pyinfer wrote"):
                write()
        assert path.read_bytes() == body + foreign
    path.write_bytes(body + bytes(100))  # padding
    assert load(path) is None
    write_section(path, one(1))
    assert same(load(path), one(1).entries) and path.read_bytes().startswith(body + b"PYINFER>")


def test_an_absurd_alignment_is_refused(tmp_path: Path) -> None:
    for exponent, kind in ((31, 4), (62, 10)):
        value = struct.pack("<I" if kind == 4 else "<Q", 1 << exponent)
        (tmp_path / "model.gguf").write_bytes(
            samples.raw_gguf((samples.pair("general.alignment", kind, value),))
        )
        assert load(tmp_path / "model.gguf") is None
        with pytest.raises(FormatError, match=f"aligns its tensors to {1 << exponent} bytes"):
            write_section(tmp_path / "model.gguf", one(1))


A = {"type": "int32", "shape": [2], "begin": 0}
DIRECTORIES = {
    "no object": b"[]",
    "no JSON": b'{"e":',
    "not UTF-8": b'{"\xff":1}',
    "infinite": b'{"e":{"info":{"x":1e999},"arrays":{}}}',
    "NaN": b'{"e":{"info":{"x":NaN},"arrays":{}}}',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep object": b'{"e":{"info":{"x":' + b"[" * 20 + b"]" * 20 + b'},"arrays":{}}}',
    "long number": b'{"e":{"info":{"x":' + b"1" * 10_000 + b'},"arrays":{}}}',
    "no entry": b'{"e":3}',
    "no info": b'{"e":{"arrays":{}}}',
    "no arrays": b'{"e":{"info":{},"arrays":[]}}',
    "array is null": {"a": None},
    "type": {"a": {**A, "type": "object"}},
    "type is a list": {"a": {**A, "type": ["int32"]}},
    "shape": {"a": {**A, "shape": 2}},
    "negative": {"a": {**A, "shape": [-1, -2]}},
    "bool shape": {"a": {**A, "shape": [True]}},
    "many dimensions": {"a": {**A, "shape": [1] * 9}},
    "huge": {"a": {**A, "shape": [1 << 62, 1 << 62]}},
    "huge and empty": {"a": {**A, "shape": [0, 1 << 70]}},
    "long lengths": {"a": {**A, "shape": [10**4000] * 8}},
    "a product of many digits": {"a": {**A, "shape": [10**290] * 8}},
    "no float": b'{"e":{"info":{"x":1' + b"0" * 400 + b'},"arrays":{}}}',
    "one too many": {"a": {**A, "shape": [9]}},
    "begin": {"a": {**A, "begin": 32}},
    "negative begin": {"a": {**A, "begin": -32}},
    "no begin": {"a": {"type": "int32", "shape": [2]}},
    "overlapping": {"a": A, "b": A},
    "behind the end": {"a": A, "b": {**A, "begin": 32}},
}


@pytest.mark.parametrize("case", DIRECTORIES)
def test_directories_that_lie_are_refused(path: Path, case: str) -> None:
    lie = DIRECTORIES[case]
    text = lie if isinstance(lie, bytes) else json.dumps({"e": {"info": {}, "arrays": lie}}).encode()
    append(path, raw_section(text, bytes(32), hash_bytes(path)))
    refused(path, "placement section has a")
    write_section(path, one(1))
    assert same(load(path), one(1).entries)


@pytest.mark.parametrize(
    "lies", [{"nbytes": 1 << 62}, {"nbytes": 0}, {"directory": 1 << 60}, {"directory": 0}]
)
def test_lengths_that_lie_allocate_nothing(path: Path, lies: dict[str, int]) -> None:
    append(path, raw_section(b"{}", bytes(64), hash_bytes(path), **lies))
    with open_gguf(path) as file:
        tracemalloc.start()
        with pytest.raises(FormatError, match="placement section"):
            read_section(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 19


@pytest.mark.parametrize("footer", [False, True])
def test_a_hole_is_not_read(path: Path, footer: bool) -> None:
    """A file that takes nothing on the disk may claim any length."""
    begin, nbytes = path.stat().st_size, 300 << 20 if footer else 64 << 20
    append(path, raw_section(b"{}", b"", hash_bytes(path), nbytes=nbytes)[:64])
    with open(path, "r+b") as file:
        file.truncate(begin + nbytes)
        if footer:
            file.seek(-32, 2)
            file.write(struct.pack("<QQII8s", nbytes, 1, 1, 0, b"<PYINFER"))
    with open_gguf(path) as file:
        tracemalloc.start()
        with pytest.raises(FormatError, match="expected at most 268435456" if footer else "has no footer"):
            read_section(file)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 1 << 19


def test_no_memory_is_one_sentence(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_section(path, one(1))

    def refuse(length: int) -> bytearray:
        raise MemoryError

    monkeypatch.setattr(section, "bytearray", refuse, raising=False)
    refused(path, "needs more memory than there is")


def test_what_is_not_read_is_not_written(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = path.read_bytes()
    with pytest.raises(InputError, match="an integer of 301 digits"):
        write_section(path, Section({"e": Entry({"x": 10**300})}))
    monkeypatch.setattr(section_bytes, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="expected at most 1000 bytes"):
        write_section(path, one(1, 300))
    with pytest.raises(InputError, match="take 1088 bytes, expected at most 1000"):
        write_section(path, Section({"e": Entry({"text": "x" * 940})}))
    assert path.read_bytes() == before


def test_of_two_sections_the_newer_counts(path: Path) -> None:
    model, text = hash_bytes(path), b'{"%s":{"info":{},"arrays":{}}}'
    for first, last, expected in ((1, 2, "last"), (2, 1, "first")):
        body = path.read_bytes()
        append(path, raw_section(text % b"first", b"", model, first) + bytes(96))
        append(path, raw_section(text % b"last", b"", model, last))
        found = load(path)
        assert found is not None and list(found.entries) == [expected]
        path.write_bytes(body)
