"""How often each neuron fired, as PowerInfer's profiler leaves it: activation_0.pt, activation_1.pt ...

Each file is one tensor of torch.save with a count per neuron of that layer. Layers are taken by their number:
sorted as texts, 10 would come before 2, which gave nearly every layer of PowerInfer's own placements the hot
neurons of another one.

Source: PowerInfer's solver and export script (format only).
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from pyinfer.errors import FormatError, ModelNotFoundError, UnsupportedError
from pyinfer_convert.torch_file import open_torch_file

_FILE = re.compile(r"activation_(.*)\.pt")
_NUMBER = re.compile(r"0|[1-9][0-9]{0,5}")
_INTEGERS = ("U8", "I8", "I16", "I32", "I64")
_FLOATS = ("F16", "BF16", "F32", "F64")


def read_activations(folder: Path, *, expected: tuple[int, int] | None = None) -> list[np.ndarray]:
    """Counts of all layers, by number: int64 [F], or float64 [F] where the files hold floats.

    folder : with activation_0.pt ..., or with a folder `activation` that has them
    expected : layers and neurons per layer of the model
    raises ModelNotFoundError (no such files), FormatError (a missing layer, unequal sizes, counts that are
    negative or no number), UnsupportedError (a pickle that asks for more than a tensor)
    """
    paths = _find_layers(Path(folder))
    if expected is not None and len(paths) != expected[0]:
        raise FormatError(
            f"{paths[0].parent}: has activations of {len(paths)} layers, the model has {expected[0]}"
        )
    counts: list[np.ndarray] = []
    for path in paths:
        counts.append(_read_counts(path))
        found, first = len(counts[-1]), len(counts[0])
        if expected is not None and found != expected[1]:
            raise FormatError(
                f"{path}: has counts of {found} neurons, the model has {expected[1]} in each layer"
            )
        if found != first:
            raise FormatError(
                f"{path}: has counts of {found} neurons, expected {first} as in {paths[0].name}"
            )
    return counts


def _find_layers(folder: Path) -> list[Path]:
    inner = folder / "activation"
    places = [place for place in (folder, inner) if place.is_dir()]
    for place in places:
        found: dict[int, Path] = {}
        for path in sorted(place.iterdir()):
            match = _FILE.fullmatch(path.name)
            if match is None:
                continue
            if not _NUMBER.fullmatch(match[1]):
                raise FormatError(f"{path}: names no layer, expected activation_0.pt, activation_1.pt ...")
            found[int(match[1])] = path
        if found:
            missing = next((layer for layer in range(len(found)) if layer not in found), None)
            if missing is not None:
                raise FormatError(
                    f"{place}: activation_{missing}.pt is missing, expected the files of all layers up to "
                    f"{max(found)}"
                )
            return [found[layer] for layer in range(len(found))]
    fault = "has no activation_0.pt, neither has a folder activation in it" if places else "no such folder"
    raise ModelNotFoundError(f"{folder}: {fault}; expected PowerInfer's activation_0.pt, activation_1.pt ...")


def _read_counts(path: Path) -> np.ndarray:
    file = open_torch_file(path)
    try:
        tensor = file.tensors.get("")
        if tensor is None:
            raise FormatError(f"{path}: holds a dictionary, expected one tensor with a count per neuron")
        if len(tensor.shape) != 1 or tensor.shape[0] == 0:
            raise FormatError(
                f"{path}: the tensor has shape {list(tensor.shape)}, expected [neurons] with a count for each"
            )
        if tensor.dtype not in (*_INTEGERS, *_FLOATS):
            raise UnsupportedError(f"{path}: the counts are {tensor.dtype}, expected integers or floats")
        if tensor.dtype == "F64":  # TensorFile gives float32, which rounds counts
            counts = np.fromfile(path, "<f8", tensor.shape[0], offset=tensor.start)
        else:
            counts = file.read("")
            if tensor.dtype == "BF16":
                counts = (counts.astype(np.uint32) << 16).view(np.float32)
        counts = counts.astype(np.int64 if tensor.dtype in _INTEGERS else np.float64)
    finally:
        file.close()
    wrong = np.flatnonzero(~(np.isfinite(counts) & (counts >= 0)))
    if len(wrong):
        raise FormatError(
            f"{path}: the count of neuron {wrong[0]} is {counts[wrong[0]]}, expected a number from 0 on"
        )
    return counts
