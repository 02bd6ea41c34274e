"""The safetensors reader against arrays that are written by hand, and against files that lie."""

from __future__ import annotations

import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfer.errors import FormatError, InputError, ModelNotFoundError, PyInferError, UnsupportedError
from pyinfer_convert.safetensors_file import MAX_HEADER_BYTES, open_safetensors

RANDOM = np.random.default_rng(5)
TENSORS = {
    "a.weight": RANDOM.standard_normal((4, 6)).astype(np.float32),
    "b.weight": RANDOM.standard_normal((3, 2, 5)).astype(np.float16),
    "bits": RANDOM.integers(0, 1 << 16, (5, 2)).astype(np.uint16),
    "wide": RANDOM.standard_normal(3),
    "numbers": np.arange(4),
    "bytes": np.arange(3, dtype=np.uint8),
    "scalar": np.array(2.5, np.float32),
    "none": np.zeros((0, 3), np.float32),
}


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def test_every_type_is_read_as_it_was_written(path: Path) -> None:
    file = open_safetensors(write(path, safetensors(TENSORS)))
    assert list(file.tensors) == list(TENSORS)
    for name, array in TENSORS.items():
        found = file.read(name)
        expected = array.astype(np.float32) if array.dtype == np.float64 else array
        assert found.dtype == expected.dtype and found.shape == expected.shape
        assert np.array_equal(found, expected) and found.flags.aligned and found.flags.c_contiguous
    assert [file.tensors[name].dtype for name in ("a.weight", "b.weight", "bits", "wide")] == [
        "F32", "F16", "BF16", "F64",
    ]  # fmt: skip
    file.close()


@pytest.mark.parametrize("name", ["a.weight", "b.weight", "bits", "wide"])
@pytest.mark.parametrize("rows", [slice(1, 3), slice(None), slice(2, 99), slice(-1, None), slice(3, 2)])
def test_rows_are_those_of_the_array(path: Path, name: str, rows: slice) -> None:
    file = open_safetensors(write(path, safetensors(TENSORS)))
    assert np.array_equal(file.read(name, rows), TENSORS[name][rows].astype(file.read(name).dtype))


def test_rows_with_a_step_are_refused(path: Path) -> None:
    file = open_safetensors(write(path, safetensors(TENSORS)))
    with pytest.raises(InputError, match=r"a\.weight of shape \[4, 6\]: rows are .*expected a plain range"):
        file.read("a.weight", slice(0, 4, 2))


def test_a_large_tensor_is_mapped_not_copied(path: Path) -> None:
    file = open_safetensors(write(path, safetensors({"x": np.zeros((64, 64), np.float32)})))
    assert not file.read("x").flags.owndata and not file.read("x").flags.writeable


def test_an_array_outlives_its_file(path: Path) -> None:
    file = open_safetensors(write(path, safetensors(TENSORS)))
    array = file.read("a.weight")
    file.close()
    assert np.array_equal(array, TENSORS["a.weight"])


@pytest.mark.skipif(sys.platform != "linux", reason="resident memory is read from /proc")
def test_reading_a_large_file_needs_the_memory_of_one_tensor(path: Path) -> None:
    """Eight tensors of 32 MiB in a file without blocks on disk."""
    rows, count = 1 << 13, 8
    header = {
        str(n): {"dtype": "F32", "shape": [rows, 1024], "data_offsets": [n << 25, n + 1 << 25]}
        for n in range(count)
    }
    path.write_bytes(safetensors({}, header))
    with open(path, "r+b") as handle:
        handle.truncate(path.stat().st_size + (count << 25))

    def resident_bytes() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    file = open_safetensors(path)
    before = resident_bytes()
    most = 0
    for name in file.tensors:
        for first in range(0, rows, 1024):
            assert file.read(name, slice(first, first + 1024)).max() == 0
            most = max(most, resident_bytes())
        assert file.read(name).max() == 0
        most = max(most, resident_bytes())
    assert most - before < 2 << 25


def hostile(tensors: dict[str, np.ndarray] = TENSORS, header: dict | None = None, **changes: dict) -> bytes:
    return safetensors(tensors, header, **changes)


WHOLE = safetensors(TENSORS)
HOSTILE = {
    "cut off in the data": (WHOLE[:-1], r"tensor scalar ends at byte \d+, but the file has"),
    "cut off in the header": (WHOLE[:100], r"header has \d+ bytes, but the file has 100 bytes"),
    "shorter than a length": (b"abc", r"but the file has 3 bytes"),
    "longer than its tensors": (WHOLE + b"x", r"the file has \d+ bytes, but its tensors end at byte \d+"),
    "huge header": (
        struct.pack("<Q", 1 << 62) + b"{}",
        r"header has 4611686018427387904 bytes, but the file",
    ),
    "no JSON": (struct.pack("<Q", 4) + b"abcd", r"the header is no JSON"),
    "no UTF-8": (struct.pack("<Q", 2) + b"\xff\xfe", r"the header is no JSON"),
    "deep JSON": (struct.pack("<Q", 1 << 17) + b"[" * (1 << 17), r"the header is no JSON"),
    "a list": (struct.pack("<Q", 2) + b"[]", r"the header is a list, expected an object"),
    "twice": (struct.pack("<Q", 13) + b'{"a":1,"a":2}', r"a occurs twice"),
    "no object": (hostile(header={"a": 7}), r"tensor a is described by 7, expected dtype, shape"),
    "no offsets": (hostile(header={"a": {"dtype": "F32", "shape": []}}), r"tensor a is described by"),
    "too many bytes": (
        hostile(**{"bits": {"shape": [5, 3]}}),
        r"bits of type BF16 and shape \[5, 3\] takes 20",
    ),
    "negative": (hostile(**{"bits": {"shape": [-5, -2]}}), r"bits has shape \[-5, -2\], expected a list"),
    "not whole": (hostile(**{"bits": {"shape": [2.5, 4]}}), r"bits has shape \[2\.5, 4\]"),
    "true": (hostile(**{"bits": {"shape": [True, 10]}}), r"bits has shape \[True, 10\]"),
    "huge shape": (
        hostile(**{"none": {"shape": [0, 1 << 61]}}),
        r"none has shape \[0, 2305843009213693952\]",
    ),
    "many dimensions": (hostile(**{"bits": {"shape": [1] * 9}}), r"expected a list of at most 8"),
    "offsets": (hostile(**{"bits": {"data_offsets": [20, 0]}}), r"bits has data_offsets \[20, 0\]"),
    "one offset": (hostile(**{"bits": {"data_offsets": [20]}}), r"bits has data_offsets \[20\]"),
    "beyond": (
        hostile(**{"bits": {"data_offsets": [1 << 40, (1 << 40) + 20]}}),
        r"tensor bits ends at byte \d+, but the file has",
    ),
    "gap": (
        safetensors({"a": np.zeros(4, np.float32)}, a={"shape": [2], "data_offsets": [8, 16]}),
        r"leaves a gap",
    ),
    "overlap": (
        hostile(**{"bits": {"data_offsets": [96, 116]}}),
        r"starts at byte \d+, expected \d+: it overlaps",
    ),
    "empty file": (b"", r"the file is empty"),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\noid", r"Git LFS pointer.*git lfs pull"),
}


@pytest.mark.parametrize("data, message", HOSTILE.values(), ids=HOSTILE)
def test_hostile_files_are_refused_by_name(path: Path, data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as error:
        open_safetensors(write(path, data))
    assert "model.safetensors" in str(error.value) and "\n" not in str(error.value)


def test_places_beyond_some_gigabytes_are_no_fault(path: Path) -> None:
    first, last = 1 << 30, (1 << 30) + 16
    header = {
        "a": {"dtype": "U8", "shape": [first], "data_offsets": [0, first]},
        "b": {"dtype": "U8", "shape": [16], "data_offsets": [first, last]},
    }
    path.write_bytes(safetensors({}, header))
    with open(path, "r+b") as handle:
        handle.truncate(path.stat().st_size + last)
    assert open_safetensors(path).read("b", slice(11, 16)).tolist() == [0] * 5


def test_a_header_beyond_all_models_is_refused_before_it_is_read(path: Path) -> None:
    path.write_bytes(struct.pack("<Q", MAX_HEADER_BYTES + 1))
    with open(path, "r+b") as handle:
        handle.truncate(MAX_HEADER_BYTES + 100)
    with pytest.raises(FormatError, match=rf"expected at most {MAX_HEADER_BYTES}"):
        open_safetensors(path)


def test_unknown_types_are_named(path: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"tensor bits has type 'Q9', expected one of BOOL, .*BF16"):
        open_safetensors(write(path, safetensors(TENSORS, bits={"dtype": "Q9"})))


def test_eight_bit_floats_are_refused_when_read_beside_others(path: Path) -> None:
    file = open_safetensors(write(path, safetensors(TENSORS, bytes={"dtype": "F8_E4M3"})))
    assert np.array_equal(file.read("a.weight"), TENSORS["a.weight"])
    with pytest.raises(
        UnsupportedError, match=r"model\.safetensors: tensor bytes is F8_E4M3, expected F32, F16"
    ):
        file.read("bytes")


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="this is a folder, expected a safetensors file"):
        open_safetensors(tmp_path)
    with pytest.raises(ModelNotFoundError, match="no such file"):
        open_safetensors(tmp_path / "absent.safetensors")


def test_an_odd_header_length_gives_aligned_arrays(path: Path) -> None:
    text = b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
    text += b" " * (1 if len(text) % 4 == 0 else 0)
    data = np.array([1.5, -2.0], np.float32)
    file = open_safetensors(write(path, struct.pack("<Q", len(text)) + text + data.tobytes()))
    assert np.array_equal(file.read("x"), data) and file.read("x").flags.aligned


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_damage_is_refused_or_read_safely(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    header_bytes = 8 + struct.unpack("<Q", WHOLE[:8])[0]
    damaged = bytearray(WHOLE)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, header_bytes - 1))] = data.draw(st.integers(0, 255))
    path = write(tmp_path_factory.getbasetemp() / "damaged.safetensors", bytes(damaged))
    try:
        file = open_safetensors(path)
        for name in file.tensors:
            array = file.read(name)
            assert array.nbytes <= 2 * len(WHOLE)
    except PyInferError as error:
        assert re.search(r"damaged\.safetensors", str(error))
