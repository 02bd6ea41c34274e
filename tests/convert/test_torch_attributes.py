"""Tensors with attributes of their own, which torch pickles in another form: read as tensors, no more."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import torch_file, torch_typed_pickle

from pyinfer.errors import FormatError, UnsupportedError
from pyinfer_convert.torch_file import open_torch_file

GOLDEN = Path(__file__).parent.parent / "golden" / "torch"
ARRAY = np.arange(6, dtype=np.float32).reshape(2, 3)
TENSOR = b"ctorch._utils\n_rebuild_tensor_v2\n"
PARAMETER = b"ctorch.nn.parameter\nParameter\n"


def read(path: Path, pickled: bytes) -> np.ndarray:
    path.write_bytes(torch_file({"x": ARRAY}, pickled))
    return open_torch_file(path).read("x")


def test_what_torch_wrote_is_read() -> None:
    """tools/golden_torch.py says what is inside."""
    file = open_torch_file(GOLDEN / "attributes.bin")
    assert list(file.tensors) == ["plain", "noted"]
    assert np.array_equal(file.read("noted"), ARRAY) and file.read("plain").tolist() == list(range(24))


@pytest.mark.parametrize("kind", [b"ctorch\nTensor\n", PARAMETER])
@pytest.mark.parametrize("state", [b"}", b"}X\x03\x00\x00\x00fooK\x01s", b"ccollections\nOrderedDict\n)R"])
def test_the_tensor_is_taken(tmp_path, kind, state) -> None:
    assert np.array_equal(read(tmp_path / "x.bin", torch_typed_pickle(ARRAY, TENSOR, kind, state)), ARRAY)


@pytest.mark.parametrize(
    "pickled, error, message",
    [
        (
            torch_typed_pickle(ARRAY, b"ctorch._utils\n_rebuild_parameter\n"),
            UnsupportedError,
            r"made by torch\._utils\._rebuild_parameter, expected torch\._utils\._rebuild_tensor_v2",
        ),
        (
            torch_typed_pickle(ARRAY, b"ctorch._tensor\n_rebuild_from_type_v2\n"),
            UnsupportedError,
            "_rebuild_from_type_v2, expected",
        ),
        (torch_typed_pickle(ARRAY, b"cos\nsystem\n"), UnsupportedError, r"asks for os\.system.*refused"),
        (torch_typed_pickle(ARRAY, b"K\x01"), UnsupportedError, "made by int, expected"),
        (
            torch_typed_pickle(ARRAY, kind=b"ccollections\nOrderedDict\n"),
            UnsupportedError,
            r"made by collections\.OrderedDict, expected torch\.Tensor or torch\.nn\.parameter\.Parameter",
        ),
        (
            torch_typed_pickle(ARRAY, kind=b"ctorch\nFloatStorage\n"),
            UnsupportedError,
            r"made by torch\.FloatStorage",
        ),
        (torch_typed_pickle(ARRAY, kind=b"cbuiltins\ntype\n"), UnsupportedError, r"asks for builtins\.type"),
        (torch_typed_pickle(ARRAY, state=b"(}}t"), FormatError, "makes no sense"),
        (torch_typed_pickle(ARRAY, state=b"N"), FormatError, "makes no sense"),
        (torch_typed_pickle(ARRAY, state=b""), FormatError, "makes no sense"),
        (torch_typed_pickle(ARRAY, state=b"}}"), FormatError, "makes no sense"),
        (torch_typed_pickle(ARRAY, arguments=b"]"), FormatError, "makes no sense"),
        (torch_typed_pickle(ARRAY, arguments=b")"), FormatError, "makes no sense"),
        (torch_typed_pickle(ARRAY, arguments=b"(NNNNNNt"), FormatError, "makes no sense"),
        (
            torch_typed_pickle(ARRAY, state=b"}X\x01\x00\x00\x00acposix\nsystem\ns"),
            UnsupportedError,
            r"asks for posix\.system",
        ),
        (b"\x80\x02ctorch\nTensor\n)R.", FormatError, "makes no sense"),
        (b"\x80\x02ctorch.nn.parameter\nParameter\n)R.", FormatError, "makes no sense"),
        (b"\x80\x02ctorch._tensor\n_rebuild_from_type\n.", UnsupportedError, "_rebuild_from_type, which"),
    ],
)
def test_anything_else_is_refused(tmp_path, pickled, error, message) -> None:
    with pytest.raises(error, match=message):
        read(tmp_path / "x.bin", pickled)


def test_torch_and_we_read_the_same(tmp_path) -> None:
    """Also a hand-written pickle of ours: torch reads it as what we say it is."""
    torch = pytest.importorskip("torch", reason="the extra [oracle]; attributes.bin stands for it")
    for tensor in (
        torch.arange(6.0),
        torch.arange(5, dtype=torch.int64),
        torch.ones(2, 3).to(torch.bfloat16),
    ):
        tensor.foo = 1
        file = io.BytesIO()
        torch.save({"x": tensor}, file)
        assert b"_rebuild_from_type_v2" in file.getvalue()
        (tmp_path / "x.bin").write_bytes(file.getvalue())
        found = open_torch_file(tmp_path / "x.bin").read("x")
        assert found.tobytes() == tensor.contiguous().view(torch.uint8).numpy().tobytes()
    state = b"}X\x03\x00\x00\x00fooK\x01s"
    ours = torch_file({"x": ARRAY}, torch_typed_pickle(ARRAY, state=state))
    (tmp_path / "ours.bin").write_bytes(ours)
    with zipfile.ZipFile(tmp_path / "ours.bin", "a") as archive:
        archive.writestr("archive/version", "3\n")
    theirs = torch.load(tmp_path / "ours.bin", weights_only=False)["x"]
    assert theirs.foo == 1 and np.array_equal(theirs.numpy(), ARRAY)
