"""The predictors of a model: how good they are, from which score on a neuron is computed, whether they fit.

The matrices are tensors of the file's body, blk.N.fc1.weight [r, D] and blk.N.fc2.weight [F, r] (in NumPy's
order; PowerInfer's names). The entry "predictors" of its section says the rest. Neuron f of a layer is
computed when score[f] >= thresholds[f], score = fc2 . relu(fc1 . x) or, linear, fc2 . (fc1 . x).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from pyinfer import names, quants
from pyinfer.errors import FormatError
from pyinfer.gguf_file import GGUFFile
from pyinfer.section import Entry

RELU, LINEAR = FORMS = "relu", "linear"
NORM, RAW = INPUTS = "norm", "raw"
_SHARES = ("recall", "precision", "predicted", "fired")
_MOST_RANK, _MOST_TOKENS = 1 << 20, 1 << 62
_MOST_LEVEL = 1e30  # log-odds, far beyond any score


@dataclass(frozen=True)
class PredictorQuality:
    """One layer's predictor, measured on held-out text with its weights as the file holds them.

    rank : hidden size;  form : relu or linear;  input : norm (what the layer reads) or raw (before its norm)
    threshold : the level of the layer, log-odds of firing that a neuron needs to be computed
    recall : of the neurons that fired the predicted ones;  precision : of the predicted the ones that fired
    predicted, fired : share of all neurons, mean over the tokens;  tokens : of held-out text
    """

    rank: int
    form: str
    input: str
    threshold: float
    recall: float
    precision: float
    predicted: float
    fired: float
    tokens: int


@dataclass(frozen=True, eq=False)
class Predictors:
    """Of all layers. thresholds : float32 [L, F]; -inf: always computed."""

    layers: tuple[PredictorQuality, ...]
    thresholds: np.ndarray

    def to_entry(self) -> Entry:
        described = []
        for each in self.layers:
            info = asdict(each)
            if not math.isfinite(each.threshold):  # JSON has no infinity
                info["threshold"] = None
            described.append(info)
        return Entry({"layers": described}, {"thresholds": np.ascontiguousarray(self.thresholds, np.float32)})

    @classmethod
    def from_entry(cls, entry: Entry, n_layers: int, n_neurons: int) -> Predictors:
        """Raises FormatError, one sentence without the file's name, for what does not fit the model."""
        given = entry.info.get("layers")
        if not isinstance(given, list) or len(given) != n_layers:
            found = f"{len(given)} layers" if isinstance(given, list) else "no list of layers"
            raise FormatError(f"the predictors' entry has {found}, expected {n_layers}; make new predictors")
        layers = tuple(_quality(each, layer) for layer, each in enumerate(given))
        thresholds = entry.arrays.get("thresholds")
        shape = None if thresholds is None else thresholds.shape
        if thresholds is None or shape != (n_layers, n_neurons) or thresholds.dtype != np.float32:
            raise FormatError(
                f"the predictors' entry has thresholds of shape {shape}, expected float32 "
                f"{(n_layers, n_neurons)}; make new predictors"
            )
        wrong = np.argwhere(np.isnan(thresholds))
        if len(wrong):
            raise FormatError(
                f"the predictors' threshold of layer {wrong[0][0]}, neuron {wrong[0][1]} is no number; "
                "make new predictors"
            )
        return cls(layers, thresholds)

    def agree_with(self, ranks: list[int]) -> None:
        """Raises FormatError where the file's matrices have other ranks (see `predictor_ranks`)."""
        for layer, (quality, rank) in enumerate(zip(self.layers, ranks)):
            if quality.rank != rank:
                raise FormatError(
                    f"the predictor of layer {layer} has rank {rank}, its entry in the section says "
                    f"{quality.rank}; make new predictors"
                )


def _quality(given: object, layer: int) -> PredictorQuality:
    if not isinstance(given, Mapping):
        raise FormatError(
            f"the predictors' entry describes layer {layer} by no dictionary; make new predictors"
        )
    values: dict[str, Any] = {each.name: given.get(each.name) for each in fields(PredictorQuality)}
    if values["threshold"] is None:
        values["threshold"] = -math.inf
    for name, value in values.items():
        if not _is_sound(name, value):
            raise FormatError(
                f"the predictors' entry says {name} {value!r:.40} of layer {layer}, "
                f"expected {_EXPECTED[name]}; make new predictors"
            )
    for name in ("threshold", *_SHARES):
        values[name] = float(values[name])
    return PredictorQuality(**values)


_EXPECTED = {
    "rank": "a number from 1 on",
    "form": " or ".join(FORMS),
    "input": " or ".join(INPUTS),
    "threshold": "a number",
    "tokens": "a count",
    **dict.fromkeys(_SHARES, "a share from 0 to 1"),
}


def _is_sound(name: str, value: object) -> bool:
    if name in ("form", "input"):
        return isinstance(value, str) and value in (FORMS if name == "form" else INPUTS)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        return False
    if name in _SHARES:
        return 0 <= value <= 1
    if name == "threshold":
        return value == -math.inf or abs(value) <= _MOST_LEVEL
    least, most = (1, _MOST_RANK) if name == "rank" else (0, _MOST_TOKENS)
    return isinstance(value, int) and least <= value <= most


def predictor_ranks(file: GGUFFile, n_layers: int, width: int, n_neurons: int) -> list[int] | None:
    """Hidden sizes of all layers; None where the file has no predictors.

    raises FormatError when a layer has none, or matrices of a type that cannot be read, or that fit neither
    each other nor the model (width D, n_neurons F)
    """
    wanted = [names.weight(part, layer) for layer in range(n_layers) for part in (names.FC1, names.FC2)]
    there = [name for name in wanted if name in file.tensors]
    if not there:
        return None
    if len(there) < len(wanted):
        missing = next(name for name in wanted if name not in file.tensors)
        raise FormatError(
            f"{file.path.name}: {missing} is missing, expected predictors of all {n_layers} layers or of none"
        )
    ranks, types = [], quants.names()
    for layer in range(n_layers):
        fc1, fc2 = (file.tensors[names.weight(part, layer)] for part in (names.FC1, names.FC2))
        rank = fc1.shape[1] if len(fc1.shape) == 2 else 0
        if rank < 1 or fc1.shape != (width, rank) or fc2.shape != (rank, n_neurons):
            raise FormatError(
                f"{file.path.name}: the predictor of layer {layer} has shapes {list(fc1.shape)} and "
                f"{list(fc2.shape)}, expected [{width}, r] and [r, {n_neurons}] with one r from 1 on"
            )
        for each in (fc1, fc2):
            if each.type.name.lower() not in types:
                raise FormatError(
                    f"{file.path.name}: {each.name} has type {each.type.name}, "
                    f"expected one of {', '.join(types)}"
                )
        ranks.append(rank)
    return ranks


class Tally:
    """Counts predictions against firings, some rows at a time."""

    def __init__(self) -> None:
        self._hits = self._guesses = self._firings = self._neurons = 0

    def add(self, predicted: np.ndarray, fired: np.ndarray) -> None:
        """Two bool arrays [n, F]."""
        self._hits += int(np.count_nonzero(predicted & fired))
        self._guesses += int(np.count_nonzero(predicted))
        self._firings += int(np.count_nonzero(fired))
        self._neurons += fired.size

    def shares(self) -> dict[str, float]:
        """recall, precision, predicted and fired as PredictorQuality has them. Of nothing, all was found."""
        return {
            "recall": self._hits / self._firings if self._firings else 1.0,
            "precision": self._hits / self._guesses if self._guesses else 1.0,
            "predicted": self._guesses / max(1, self._neurons),
            "fired": self._firings / max(1, self._neurons),
        }
