"""The placement section: what is written is read, what is damaged is refused, and the model stays."""

from __future__ import annotations

import errno
import hashlib
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import gguf
import gguf_samples as samples
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from section_samples import hash_bytes, load, one, raw_section, same

from pyinfer import section
from pyinfer.errors import CapacityError, InputError, ModelNotFoundError
from pyinfer.gguf_file import open_gguf
from pyinfer.section import (
    Entry,
    Section,
    body_bytes,
    read_section,
    update_section,
    write_section,
)

NAMES = st.text(min_size=1, max_size=12)
INFO = st.dictionaries(
    st.text(max_size=8),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
        max_leaves=6,
    ),
    max_size=4,
)


@st.composite
def arrays(draw) -> np.ndarray:
    dtype = np.dtype(draw(st.sampled_from("?bBhHiIlLqQefd")))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    noise = np.random.default_rng(draw(st.integers(0, 99))).integers(
        0, 256, (*shape, dtype.itemsize), np.uint8
    )
    made = (noise[..., 0] > 99) if dtype.kind == "b" else noise.view(dtype)[..., 0]
    if draw(st.booleans()):
        made = made.astype(dtype.newbyteorder(">"))
    return made.T if draw(st.booleans()) else made


ENTRIES = st.dictionaries(
    NAMES, st.builds(Entry, INFO, st.dictionaries(NAMES, arrays(), max_size=3)), min_size=1, max_size=3
)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return samples.write_tiny(tmp_path / "model.gguf")


@pytest.fixture(scope="module", autouse=True)
def unsynced() -> Iterator[None]:
    """Waiting for the disk takes most of the time; test_section_atomic.py looks at when it is asked."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(section, "_sync", lambda handle: None)
        yield


@settings(max_examples=40, deadline=None)
@given(ENTRIES, ENTRIES)
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, first, second) -> None:
    path = samples.write_tiny(tmp_path_factory.mktemp("section") / "model.gguf")
    body = path.read_bytes()
    write_section(path, Section(first))
    assert same(load(path), first)
    assert list(update_section(path, **second).entries) == list({**first, **second})
    assert same(load(path), {**first, **second})
    assert path.read_bytes()[: len(body)] == body and path.stat().st_size % 32 == 0
    update_section(path, **dict.fromkeys({**first, **second}))
    assert load(path) is None and path.read_bytes() == body


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3000), min_size=1, max_size=8))
def test_any_sequence_of_sizes(tmp_path_factory: pytest.TempPathFactory, lengths: list[int]) -> None:
    """The file is never longer than the model and one section."""
    path = samples.write_tiny(tmp_path_factory.mktemp("section") / "model.gguf")
    body = path.read_bytes()
    for number, length in enumerate(lengths):
        write_section(path, one(number, length))
        assert same(load(path), one(number, length).entries)
        data = path.read_bytes()
        assert data.startswith(body + b"PYINFER>") and data.endswith(b"<PYINFER")
        assert len(data) < len(body) + 4 * length + 300


def test_bytes_are_those_that_the_document_says(path: Path) -> None:
    begin = path.stat().st_size
    write_section(path, one(7))
    text = b'{"e":{"info":{"n":7},"arrays":{"a":{"type":"int32","shape":[5],"begin":0}}}}'
    expected = raw_section(text, np.full(5, 7, "<i4").tobytes() + bytes(12), hash_bytes(path))
    assert path.read_bytes()[begin:] == expected


def test_the_hash_is_of_the_head_and_both_ends_of_each_tensor(tmp_path: Path) -> None:
    made = samples.writer(tmp_path / "model.gguf")
    samples.add_tensors(made)
    made.add_tensor("long", np.arange(5000, dtype=np.float32))
    samples.finish(made)
    path = tmp_path / "model.gguf"
    data = path.read_bytes()
    reader = gguf.GGUFReader(path)
    head = data[: min(each.data_offset for each in reader.tensors)]
    digest = hashlib.blake2b(len(head).to_bytes(8, "little") + head, digest_size=16)
    for each in reader.tensors:
        stored = data[each.data_offset : each.data_offset + each.n_bytes]
        digest.update(stored[:4096] + stored[-4096:])
    assert hash_bytes(path) == digest.digest()


@pytest.mark.parametrize("alignment", [8, 32, 4096])
def test_a_section_stands_behind_the_padding(tmp_path: Path, alignment: int) -> None:
    path = samples.write_sample(tmp_path / "model.gguf", alignment)
    reader = gguf.GGUFReader(path)
    last = max(each.data_offset + each.n_bytes for each in reader.tensors)
    begin = -(-last // max(alignment, 32)) * max(alignment, 32)
    path.write_bytes(path.read_bytes()[:last])  # some writers do not pad
    write_section(path, one(1))
    with open_gguf(path) as file:
        assert body_bytes(file) == begin and same(read_section(file), one(1).entries)
    assert path.read_bytes()[last : begin + 8] == bytes(begin - last) + b"PYINFER>"


def test_the_last_part_of_a_split_model_holds_it(tmp_path: Path) -> None:
    parts = samples.write_split(tmp_path)
    before = [part.read_bytes() for part in parts]
    write_section(parts[0], one(1))
    update_section(parts[1], f=Entry({"x": 1}))
    assert all(same(load(part), {**one(1).entries, "f": Entry({"x": 1})}) for part in parts)
    assert [part.read_bytes() for part in parts[:-1]] == before[:-1]
    assert parts[-1].read_bytes().startswith(before[-1] + b"PYINFER>")


def test_a_file_of_powerinfer_holds_one_too(path: Path) -> None:
    path.write_bytes(b"PWRI" + path.read_bytes()[4:])
    write_section(path, one(1))
    assert same(load(path), one(1).entries) and path.read_bytes().startswith(b"PWRI")


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"e": Entry({"x": float("nan")})}, "info of an entry cannot be stored"),
        ({"e": Entry({"x": (1, 2)})}, "changes when it is stored"),
        ({"e": Entry({3: 1})}, "changes when it is stored"),
        ({"e": Entry({"x": np.float32(1)})}, "info of an entry cannot be stored"),
        ({"e": Entry({}, {"a": np.array(["x"])})}, "array 'a' of 'e' has type <U1"),
        ({"e": Entry({}, {"a": np.zeros(3, complex)})}, "type complex128"),
        ({"e": Entry({}, {"a": np.zeros((1,) * 9)})}, "9 dimensions"),
        ({"": Entry()}, "expected 1 to 200 characters"),
        ({"e": Entry({"x": "y" * (17 << 20)})}, "expected at most 16777216"),
    ],
)
def test_what_cannot_be_stored_changes_nothing(path: Path, entries: dict[str, Entry], words: str) -> None:
    write_section(path, one(1))
    before = path.read_bytes()
    with pytest.raises(InputError, match=words):
        update_section(path, **entries)
    assert path.read_bytes() == before


def test_files_that_cannot_be_written(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelNotFoundError):
        write_section(tmp_path / "none.gguf", one(1))

    def protected(name, mode, **options):
        if "+" in mode:
            raise PermissionError(errno.EACCES, "Permission denied")
        return open(name, mode, **options)

    monkeypatch.setattr(section, "open", protected, raising=False)
    with pytest.raises(
        InputError, match=r"cannot be written, expected a file of your own.*Permission denied"
    ):
        write_section(path, one(1))
    assert load(path) is None


def test_writers_take_turns_and_lose_nothing(path: Path) -> None:
    def work(name: str) -> None:
        for number in range(12):
            update_section(path, **{f"{name}{number}": Entry({"n": number})})

    threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        found = load(path)  # readers see the old one or the new one, never something between
        assert found is None or found.entries
    for thread in threads:
        thread.join()
    found = load(path)
    assert found is not None and set(found.entries) == {f"{name}{n}" for name in "abc" for n in range(12)}


def test_a_writer_that_never_ends_is_named(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(section, "_WAIT_SECONDS", 0.05)
    write_section(path, one(1))
    with open(path, "r+b", buffering=0) as handle, section._locked(handle, path):
        with pytest.raises(InputError, match="another process is writing its placement section"):
            write_section(path, one(2))
        assert same(load(path), one(1).entries)  # readers do not wait forever


def test_a_reader_that_meets_a_writer_waits(path: Path) -> None:
    write_section(path, one(1))
    good, found = path.read_bytes(), []
    reader = threading.Thread(target=lambda: found.append(load(path)))
    with open(path, "r+b", buffering=0) as handle, section._locked(handle, path):
        handle.seek(len(good) - 50)
        handle.write(b"something between")
        reader.start()
        reader.join(0.1)
        handle.seek(0)
        handle.write(good)
    reader.join()
    assert found and same(found[0], one(1).entries)


def test_a_full_disk_loses_nothing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_section(path, one(1))
    put = section._put

    def full(handle, begin: int, data: bytes) -> None:
        put(handle, begin, data[: random.Random(begin).randrange(len(data))])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(section, "_put", full)
    with pytest.raises(
        CapacityError, match=r"failed \(No space left on device\); the file holds the old one"
    ):
        write_section(path, one(2))
    monkeypatch.undo()
    assert same(load(path), one(1).entries)
    write_section(path, one(2))
    assert same(load(path), one(2).entries)
