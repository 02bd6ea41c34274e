"""Files of torch.save: stored ones that torch wrote, hand-written ones, and ones that attack their reader."""

from __future__ import annotations

import collections
import io
import os
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import torch_file, torch_pickle
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfer.errors import FormatError, PyInferError, UnsupportedError
from pyinfer_convert.torch_file import open_torch_file
from pyinfer_convert.torch_pickle import MAX_PICKLE_BYTES, read_pickle

GOLDEN = Path(__file__).parent.parent / "golden" / "torch"
TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b.weight": np.arange(6, dtype=np.float16),
    "steps": np.arange(2),
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "pytorch_model.bin"


@pytest.mark.parametrize("file", ["state.bin", "protocol4.bin", "legacy_state.bin"])
def test_what_torch_wrote_is_read(file: str) -> None:
    """tools/golden_torch.py says what is inside."""
    opened = open_torch_file(GOLDEN / file)
    base = np.arange(24, dtype=np.float32)
    expected = {
        "f32": base.reshape(4, 6),
        "f16": base.astype(np.float16).reshape(2, 3, 4),
        "bf16": (base.view(np.uint32) >> 16).astype(np.uint16).reshape(6, 4),
        "f64": base,
        "i64": np.arange(5),
        "u8": np.arange(3, dtype=np.uint8),
        "flag": np.array([False, True]),
        "scalar": np.float32(0),
        "empty": np.zeros((0, 3), np.float32),
        "parameter": base[:6].reshape(1, 6),
        "view": base[8:20].reshape(3, 4),
        "tied": base,
    }
    assert list(opened.tensors) == list(expected)
    for name, array in expected.items():
        found = opened.read(name)
        assert found.dtype == array.dtype and found.shape == array.shape, name
        assert np.array_equal(found, array), name
    assert np.array_equal(opened.read("view", slice(1, 2)), base[12:16].reshape(1, 4))
    types = [opened.tensors[name].dtype for name in ("f32", "f16", "bf16", "f64", "i64")]
    assert types == ["F32", "F16", "BF16", "F64", "I64"]


def test_the_notes_of_a_state_dict_are_left_out() -> None:
    assert {n: t.shape for n, t in open_torch_file(GOLDEN / "linear.bin").tensors.items()} == {
        "weight": (2, 3),
        "bias": (2,),
    }


def test_a_bare_tensor_has_no_name() -> None:
    assert open_torch_file(GOLDEN / "tensor.pt").read("").tolist() == list(range(7))


def test_a_module_is_refused_by_name() -> None:
    with pytest.raises(
        UnsupportedError, match=r"module\.bin: data\.pkl: .* asks for torch\.nn\.modules\.linear\.Lin"
    ):
        open_torch_file(GOLDEN / "module.bin")


def test_a_transposed_tensor_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match=r"tensor weight of shape \[6, 4\] has strides \(1, 6\), expected \[4, 1\]"
    ):
        open_torch_file(GOLDEN / "transposed.bin")


def test_hand_written_files_are_read_without_a_copy(path: Path) -> None:
    file = open_torch_file(write(path, torch_file(TENSORS)))
    for name, array in TENSORS.items():
        assert np.array_equal(file.read(name), array) and file.read(name).dtype == array.dtype
    assert file.tensors["b.weight"].nbytes == 12


def test_strides_of_single_rows_do_not_matter(path: Path) -> None:
    file = open_torch_file(write(path, torch_file({"x": np.ones((1, 3), np.float32)}, stride=(77, 1))))
    assert file.read("x").tolist() == [[1, 1, 1]]


class Evil:
    def __init__(self, function, *arguments):
        self.pair = function, arguments

    def __reduce__(self):
        return self.pair


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
@pytest.mark.parametrize(
    "function, arguments",
    [
        (os.mkdir, ("harm",)),
        (eval, ("__import__('os').mkdir('harm')",)),
        (exec, ("import os; os.mkdir('harm')",)),
    ],
)
def test_a_hostile_pickle_executes_nothing(path, monkeypatch, protocol, function, arguments) -> None:
    monkeypatch.chdir(path.parent)
    data = pickle.dumps({"x": Evil(function, *arguments)}, protocol)
    module = "__builtin__" if function in (eval, exec) and protocol < 3 else function.__module__
    # The text protocols have instructions of their own, refused before the function is named.
    named = rf"{re.escape(module)}\.{function.__name__}" if protocol > 1 else "asks for|instruction"
    with pytest.raises(UnsupportedError, match=rf"pytorch_model\.bin: data\.pkl: .*{named}.*refused"):
        open_torch_file(write(path, torch_file({}, data)))
    assert not (path.parent / "harm").exists()
    # The attack is a real one.
    with pytest.raises(KeyError):
        pickle.loads(data)["y"]
    assert (path.parent / "harm").exists()


@pytest.mark.parametrize(
    "data, message",
    [
        (b"\x80\x02cbuiltins\neval\n.", r"asks for builtins\.eval"),
        (b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93.", r"asks for builtins\.getattr"),
        (b"\x80\x02ctorch\nload\n.", r"asks for torch\.load"),
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n.", r"_rebuild_tensor_v3"),
        (b"\x80\x02)\x81.", r"instruction 0x81 at byte 3"),
        (b"\x80\x02i__main__\nX\n.", r"instruction 0x69 at byte 2"),
        (b"\x80\x02L" + b"9" * 9999 + b"L\n.", r"instruction 0x4c"),
        (b"\x80\x02\x82\x01.", r"instruction 0x82"),
    ],
)
def test_instructions_and_names_beyond_tensors_are_refused(path: Path, data: bytes, message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        open_torch_file(write(path, torch_file({}, data)))


DICT = b"ccollections\nOrderedDict\n"
BOMB = b"\x80\x02]" + b"q\x00h\x00\x86" * 200  # a pair of itself, 200 times


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80",
        b"\x80\x02",
        b"\x80\x02.",
        b"\x80\x02t.",
        b"\x80\x02\x87.",
        b"\x80\x02X\xff\xff\xff\xffabc.",
        b"\x80\x02X\x01\x00\x00\x00\xff.",
        b"\x80\x02j\xff\xff\xff\xff.",
        b"\x80\x02NQ.",
        b"\x80\x02(X\x07\x00\x00\x00storageNNNNtQ.",
        b"\x80\x02" + DICT + b"(}tR.",
        b"\x80\x02NNR.",
        b"\x80\x02" + DICT + b"NR.",
        b"\x80\x02ctorch\nFloatStorage\n)R.",
        b"\x80\x02}Na.",
        b"\x80\x02]NNs.",
        b"\x80\x02}(NNNu.",
        b"\x80\x02N}b.",
        b"\x80\x02ccollections",
        b"\x80\x04\x8c\x01aN\x93.",
        BOMB + b"}h\x00Ns.",
        b"\x80\x02}" + BOMB[2:] + b"Ns.",
    ],
)
def test_nonsense_is_refused(path: Path, data: bytes) -> None:
    with pytest.raises(FormatError, match=r"pytorch_model\.bin: .*data\.pkl|makes no sense|holds a"):
        open_torch_file(write(path, torch_file({}, data)))


def test_a_huge_memo_number_costs_nothing() -> None:
    assert read_pickle(b"\x80\x02}r\xff\xff\xff\x7fj\xff\xff\xff\x7f.", "x") == {}


def test_nested_values_in_errors_are_not_written_out(path: Path) -> None:
    """Two tuples in a tuple, thirty times, are a thousand million of them when written."""
    nested = b"K\x01" + b"q\x05h\x05\x86" * 40
    data = torch_pickle({"x": TENSORS["b.weight"]})
    shape = data.index(b"(\x8a\x08\x06")  # the shape (6,), then the stride (1,)
    stop = data.index(b"t", shape) + 1
    with pytest.raises(FormatError, match="tensor x has shape a tuple, expected whole numbers"):
        open_torch_file(
            write(path, torch_file({"x": TENSORS["b.weight"]}, data[:shape] + nested + data[stop:]))
        )


def changed(**changes: object) -> bytes:
    return torch_file({"x": TENSORS["b.weight"]}, **changes)


@pytest.mark.parametrize(
    "data, message",
    [
        (changed(offset=1), r"tensor x of shape \[6\] takes elements 1 to 7 of its storage, which has 6"),
        (changed(offset=1 << 60), r"takes elements 1152921504606846976 to"),
        (changed(offset=-1), r"tensor x has offset -1"),
        (changed(elements=7), r"storage data/0 has 12 bytes, expected 14 \(7 x F16\)"),
        (changed(elements=1 << 60), r"has 12 bytes, expected 2305843009213693952"),
        (changed(elements=-1), r"makes no sense"),
        (torch_file({}, torch_pickle({"x": TENSORS["b.weight"]})), r"no member archive/data/0"),
        (torch_file(TENSORS)[:-30], r"zip archive cannot be read"),
        (torch_file(TENSORS)[:50], r"zip archive cannot be read"),
        (b"not a zip at all", r"begins with b'not ', expected a zip archive"),
        (b"", r"the file is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", r"Git LFS pointer"),
        (torch_file({}, b"\x80\x02K\x05."), r"holds a int, expected a dictionary"),
        (torch_file({}, b" " * (MAX_PICKLE_BYTES + 1)), rf"data\.pkl has {MAX_PICKLE_BYTES + 1} bytes"),
    ],
)
def test_lies_are_refused(path: Path, data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as error:
        open_torch_file(write(path, data))
    assert "pytorch_model.bin" in str(error.value)


def test_other_strides_are_refused(path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"tensor x of shape \[6\] has strides \(0,\), expected \[1\]"):
        open_torch_file(write(path, changed(stride=(0,))))


def test_a_zip_bomb_is_refused(path: Path) -> None:
    zeros = {"x": np.zeros(1 << 20, np.float32)}
    data = torch_file(zeros, compression=zipfile.ZIP_DEFLATED)
    assert len(data) < 1 << 14
    with pytest.raises(UnsupportedError, match=r"data\.pkl is compressed or encrypted"):
        open_torch_file(write(path, data))


def test_a_member_beyond_the_file_is_refused(path: Path) -> None:
    """The directory says more bytes than the file has."""
    data = bytearray(changed())
    entry = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1)
    for place in (20, 24):
        data[entry + place : entry + place + 4] = (1 << 30).to_bytes(4, "little")
    pickled = torch_pickle({"x": TENSORS["b.weight"]}, elements=1 << 29)
    plain = torch_pickle({"x": TENSORS["b.weight"]})
    data = bytes(data).replace(plain, pickled)
    with pytest.raises(
        FormatError, match=r"member archive/data/0 ends at byte \d+, but the file has \d+ bytes"
    ):
        open_torch_file(write(path, data))


def test_big_endian_files_are_refused(path: Path) -> None:
    file = io.BytesIO(torch_file(TENSORS))
    with zipfile.ZipFile(file, "a") as archive:
        archive.writestr("archive/byteorder", "big")
    with pytest.raises(UnsupportedError, match="big endian"):
        open_torch_file(write(path, file.getvalue()))


def test_an_archive_without_a_pickle_is_refused(path: Path) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme", "hello")
    with pytest.raises(FormatError, match=r"has 0 members data\.pkl, expected one"):
        open_torch_file(write(path, file.getvalue()))


def test_pickles_of_plain_values_are_what_python_reads() -> None:
    value = {
        "a": [1, -5, 300, 70000, 1 << 40, -(1 << 100), 2.5, None, True, False, "ä\ud800"],
        "b": ((), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)),
        3: collections.OrderedDict(x=1, y=[{}]),
    }
    for protocol in (2, 3, 4):
        assert read_pickle(pickle.dumps(value, protocol), "x") == value


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_damage_is_refused_or_read_safely(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    damaged = bytearray((GOLDEN / "state.bin").read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.getbasetemp() / "damaged.bin", bytes(damaged))
    try:
        file = open_torch_file(path)
        for name in file.tensors:
            assert file.read(name).nbytes <= 2 * len(damaged)
    except PyInferError as error:
        assert "damaged.bin" in str(error)
