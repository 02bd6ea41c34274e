"""Files of torch.save in the format before torch 1.6: torch's own, hand-written ones, damaged ones."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import torch_legacy_file, torch_tensor_pickle
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfer.errors import FormatError, PyInferError, UnsupportedError
from pyinfer_convert.torch_file import open_torch_file

GOLDEN = Path(__file__).parent.parent / "golden" / "torch"
COUNTS = np.array([3, 0, 1 << 40], np.int64)


@pytest.fixture
def written(tmp_path):
    """written(data) -> the path of a file with these bytes."""

    def write(data: bytes) -> Path:
        path = tmp_path / "old.bin"
        path.write_bytes(data)
        return path

    return write


def test_what_torch_wrote_is_read() -> None:
    """tools/golden_torch.py says what is inside; test_torch_file.py reads legacy_state.bin."""
    assert open_torch_file(GOLDEN / "legacy.bin").read("weight").tolist() == list(range(24))
    assert open_torch_file(GOLDEN / "legacy_tensor.pt").read("").tolist() == list(range(7))


def test_hand_written_files_are_read(written) -> None:
    for array in (COUNTS, np.ones((2, 3), np.float16), np.arange(4, dtype=np.float32)):
        file = open_torch_file(written(torch_legacy_file(array)))
        assert list(file.tensors) == [""] and np.array_equal(file.read(""), array)


KEYS = b"\x80\x02]X\x01\x00\x00\x00"


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"version": b"\x80\x02M\xe8\x03."}, UnsupportedError, "the format's version is not 1001"),
        ({"version": b"\x80\x02]."}, UnsupportedError, "the format's version is not 1001"),
        ({"machine": b"\x80\x02}X\x0d\x00\x00\x00little_endian\x89s."}, UnsupportedError, "big endian"),
        ({"machine": b"\x80\x02]."}, UnsupportedError, "big endian"),
        ({"keys": b"\x80\x02}."}, FormatError, "no list of storages"),
        ({"keys": b"\x80\x02]K\x00a."}, FormatError, "no list of storages"),
        ({"keys": b"\x80\x02]."}, FormatError, r"has \d+ bytes, but its storages end at byte"),
        ({"keys": KEYS + b"1a."}, FormatError, "storage 1 is listed, but not once in the object"),
        (
            {"keys": KEYS + b"0aX\x01\x00\x00\x000a.", "data": bytes(56), "count": b"\3" + bytes(7)},
            FormatError,
            "storage 0 is listed, but not once",
        ),
        ({"keys": b"\x80\x02].", "count": b"", "data": b""}, FormatError, "storage 0 is not in the file as"),
        ({"count": b"\4" + bytes(7)}, FormatError, "storage 0 has 4 elements, expected 3"),
        ({"count": b"\xff" * 8}, FormatError, "storage 0 has 18446744073709551615 elements"),
        ({"data": bytes(23)}, FormatError, r"storage 0 ends at byte \d+, but the file has \d+ bytes"),
        ({"data": bytes(25)}, FormatError, r"has \d+ bytes, but its storages end at byte"),
        ({"data": b"", "count": b""}, FormatError, "storage 0 ends at byte"),
        ({"tensor": b"\x80\x02cposix\nsystem\n."}, UnsupportedError, r"its pickles: .* asks for posix\.sys"),
        ({"tensor": torch_tensor_pickle(COUNTS, view=b"K\0")}, FormatError, "makes no sense"),
        ({"tensor": torch_tensor_pickle(COUNTS, view=b"NN")}, FormatError, "makes no sense"),
        ({"tensor": b""}, UnsupportedError, "its pickles: .* instruction"),
    ],
)
def test_lies_are_refused(written, changes, error, message) -> None:
    with pytest.raises(error, match=message) as raised:
        open_torch_file(written(torch_legacy_file(COUNTS, **changes)))
    assert "old.bin" in str(raised.value)


def test_a_storage_of_absurd_size_costs_nothing(written) -> None:
    """Sizes come from the pickle; the file is as short as it was."""
    tensor = torch_tensor_pickle(COUNTS, view=b"N")
    elements = b"\x8a\x08" + (3).to_bytes(8, "little")
    huge = b"\x8a\x08" + (1 << 61).to_bytes(8, "little")
    data = torch_legacy_file(COUNTS, tensor=tensor.replace(elements, huge, 1))
    with pytest.raises(FormatError, match=r"storage 0 ends at byte \d{19,}, but the file has \d+ bytes"):
        open_torch_file(written(data))


def test_a_hostile_pickle_executes_nothing(written, tmp_path, monkeypatch) -> None:
    class Evil:
        def __reduce__(self):
            return Path.mkdir, (tmp_path / "harm",)

    data = torch_legacy_file(COUNTS, tensor=pickle.dumps(Evil(), 2))
    with pytest.raises(UnsupportedError, match="asks for"):
        open_torch_file(written(data))
    assert not (tmp_path / "harm").exists()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_is_refused_or_read_safely(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = bytearray((GOLDEN / "legacy_state.bin").read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.getbasetemp() / "damaged_legacy.bin"
    path.write_bytes(bytes(damaged[: data.draw(st.integers(20, len(damaged)))]))
    try:
        file = open_torch_file(path)
        for name in file.tensors:
            assert file.read(name).nbytes <= 2 * len(damaged)
    except PyInferError as error:
        assert "damaged_legacy.bin" in str(error)
