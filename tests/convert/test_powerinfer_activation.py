"""PowerInfer's activation counts: layers in numeric order, and what is refused by the name of its file."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import torch_file, torch_legacy_file, torch_tensor_pickle

from pyinfer.errors import FormatError, ModelNotFoundError, UnsupportedError
from pyinfer_convert.powerinfer_activation import read_activations

LAYERS, NEURONS = 12, 9


def one(array: np.ndarray) -> bytes:
    """A file of torch.save with this tensor."""
    return torch_file({"": array}, torch_tensor_pickle(array))


def counts_of(layer: int) -> np.ndarray:
    return np.arange(NEURONS, dtype=np.int64) + 1000 * layer


@pytest.fixture
def folder(tmp_path):
    """All layers, each with counts that name it."""
    for layer in range(LAYERS):
        (tmp_path / f"activation_{layer}.pt").write_bytes(one(counts_of(layer)))
    return tmp_path


def test_layers_are_in_numeric_order(folder) -> None:
    """Sorted as texts, activation_10 would be the third layer."""
    (folder / "README.md").touch()
    found = read_activations(folder)
    assert len(found) == LAYERS
    for layer, counts in enumerate(found):
        assert counts.dtype == np.int64 and np.array_equal(counts, counts_of(layer)), layer
    assert np.array_equal(read_activations(folder, expected=(LAYERS, NEURONS))[10], counts_of(10))


def test_the_folder_above_will_do(folder, tmp_path_factory) -> None:
    parent = tmp_path_factory.mktemp("parent")
    folder.rename(parent / "activation")
    (parent / "model_0.pt").touch()
    assert np.array_equal(read_activations(parent)[11], counts_of(11))


@pytest.mark.parametrize("write", [one, torch_legacy_file])
@pytest.mark.parametrize("dtype", ["i8", "i4", "u1", "f4", "f2", "f8"])
def test_types_and_both_formats(tmp_path, write, dtype) -> None:
    given = np.array([0, 1, 100, 7], dtype)
    (tmp_path / "activation_0.pt").write_bytes(write(given))
    (found,) = read_activations(tmp_path)
    assert found.dtype == (np.float64 if dtype[0] == "f" else np.int64)
    assert found.tolist() == [0, 1, 100, 7]


def test_counts_are_exact(tmp_path) -> None:
    for dtype in ("i8", "f8"):
        (tmp_path / "activation_0.pt").write_bytes(one(np.array([(1 << 53) - 1, 3], dtype)))
        assert read_activations(tmp_path)[0].tolist() == [(1 << 53) - 1, 3]
    bits = (np.array([1.0, 96.0], np.float32).view(np.uint32) >> 16).astype(np.uint16)
    (tmp_path / "activation_0.pt").write_bytes(one(bits))
    assert read_activations(tmp_path)[0].tolist() == [1.0, 96.0]


class Evil:
    def __reduce__(self):
        return Path.mkdir, (Path("harm"),)


WRONG = {
    "NaN": (one(np.array([0.0] * 4 + [np.nan] * 5, "f4")), FormatError, "neuron 4 is nan, expected a number"),
    "infinite": (one(np.full(NEURONS, np.inf, "f2")), FormatError, "neuron 0 is inf"),
    "negative": (one(np.arange(NEURONS)[::-1] - 7), FormatError, "count of neuron 2 is -1"),
    "negative float": (one(np.full(NEURONS, -0.5, "f8")), FormatError, "count of neuron 0 is -0.5"),
    "unequal": (one(np.arange(NEURONS + 1)), FormatError, "10 neurons, expected 9 as in activation_0"),
    "matrix": (one(np.ones((3, 3), "i8")), FormatError, r"shape \[3, 3\], expected \[neurons\]"),
    "empty": (one(np.ones(0, "i8")), FormatError, r"shape \[0\], expected \[neurons\]"),
    "bool": (one(np.ones(NEURONS, "?")), UnsupportedError, "the counts are BOOL"),
    "dictionary": (torch_file({"x": np.arange(NEURONS)}), FormatError, "holds a dictionary"),
    "hostile": (torch_file({}, pickle.dumps(Evil(), 2)), UnsupportedError, "asks for .*refused"),
    "hostile and old": (
        torch_legacy_file(np.arange(NEURONS), tensor=pickle.dumps(Evil(), 2)),
        UnsupportedError,
        "asks for .*refused",
    ),
    "cut off": (one(np.arange(NEURONS))[:-40], FormatError, "cannot be read"),
    "no archive": (b"hello, world", FormatError, "expected a zip archive"),
    "nothing": (b"", FormatError, "the file is empty"),
}


@pytest.mark.parametrize("data, error, message", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_named(folder, monkeypatch, data, error, message) -> None:
    monkeypatch.chdir(folder)
    (folder / "activation_10.pt").write_bytes(data)
    with pytest.raises(error, match=rf"activation_10\.pt: .*{message}"):
        read_activations(folder)
    assert not (folder / "harm").exists()


def test_missing_layers_and_other_models_are_refused(folder) -> None:
    with pytest.raises(FormatError, match="activations of 12 layers, the model has 32"):
        read_activations(folder, expected=(32, NEURONS))
    with pytest.raises(FormatError, match=r"activation_0\.pt: has counts of 9 neurons, the model has 11008"):
        read_activations(folder, expected=(LAYERS, 11008))
    (folder / "activation_7.pt").rename(folder / "activation_12.pt")
    with pytest.raises(FormatError, match=r"activation_7\.pt is missing, expected .* all layers up to 12"):
        read_activations(folder)
    (folder / "activation_12.pt").rename(folder / "activation_07.pt")
    with pytest.raises(FormatError, match=r"activation_07\.pt: names no layer"):
        read_activations(folder)


def test_folders_without_counts_are_refused(tmp_path) -> None:
    with pytest.raises(
        ModelNotFoundError, match=r"absent: no such folder; expected PowerInfer's activation_0"
    ):
        read_activations(tmp_path / "absent")
    (tmp_path / "activation").mkdir()
    with pytest.raises(ModelNotFoundError, match=r"has no activation_0\.pt, neither has"):
        read_activations(tmp_path)


def test_what_torch_saves_is_read(tmp_path) -> None:
    torch = pytest.importorskip(
        "torch", reason="the extra [oracle]; tensor.pt and legacy_tensor.pt stand for it"
    )
    kinds = (torch.int64, torch.int32, torch.float32, torch.float64, torch.bfloat16)
    for layer in range(11):
        counts = torch.tensor([layer, 2, 3]).to(kinds[layer % len(kinds)])
        torch.save(counts, tmp_path / f"activation_{layer}.pt", _use_new_zipfile_serialization=layer % 2 == 0)
    assert [counts.tolist() for counts in read_activations(tmp_path)] == [
        [layer, 2, 3] for layer in range(11)
    ]
