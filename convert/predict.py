"""Make the predictors of a model from rows of text: a fit per layer, one size budget, thresholds, quality.

Source: PowerInfer, arXiv 2312.12456, section 5.1.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from pyinfer import names
from pyinfer.errors import InputError, UnsupportedError
from pyinfer.gguf_file import GGUFFile
from pyinfer.names import BLOCK, GGMLType
from pyinfer.neurons.low_rank import Chunks, Fit, Gate, calibrate, level_at_recall, moments, scores
from pyinfer.neurons.predictor import LINEAR, NORM, PredictorQuality, Tally
from pyinfer.neurons.predictor_search import RANK_STEP, Candidate, candidate_ranks, divide_budget
from pyinfer_convert.calibration import Rows
from pyinfer_convert.recipe import LADDER

SEARCH_TOKENS, SEARCH_STEPS = 1024, 5  # to compare sizes; the chosen one is measured with more
STRAIGHT = (0.0, 0.5, 1.0)  # weights of moments without noise that are tried
CHOOSE_ELEMENTS = 1 << 26  # scores that are held at once to choose a threshold
MARGIN = 0.25  # of the misses that are allowed, kept for text unlike the one that chose

Tick = Callable[[int, int], None]
# fit, rank and the rows to learn from -> fc1 [r, D] and fc2 [F, r]
Train = Callable[[Fit, int, Chunks], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Wish:
    """What to make: recall on held-out text, most bytes as a share of the FFN's, type in the file, form."""

    recall: float = 0.99
    budget: float = 0.08
    type: GGMLType = GGMLType.Q4_0
    form: str = LINEAR


class Matrix:
    """A matrix as the file will hold it: `packed` uint8 rows, and the numbers that they stand for."""

    def __init__(self, values: np.ndarray, type_: GGMLType) -> None:
        known = GGMLQuantizationType(type_)
        self.type = type_
        self.packed = gguf.quants.quantize(np.ascontiguousarray(values, np.float32), known)
        self.values = np.asarray(gguf.quants.dequantize(self.packed, known), np.float32)


@dataclass(frozen=True)
class Layer:
    """A finished predictor: fc1 [r, D], fc2 [F, r], thresholds float32 [F], quality."""

    fc1: Matrix
    fc2: Matrix
    thresholds: np.ndarray
    quality: PredictorQuality


def gate_of(file: GGUFFile, layer: int, activation: str) -> Gate:
    """The matrix that decides which neurons of a layer fire. Raises UnsupportedError for its type."""
    part = names.FFN_GATE if names.weight(names.FFN_GATE, layer) in file.tensors else names.FFN_UP
    threshold = float(activation.partition(":")[2] or 0)
    bias = names.bias(part, layer)
    return Gate(
        _floats(file, names.weight(part, layer)),
        _floats(file, bias).reshape(-1) if bias in file.tensors else 0.0,
        threshold,
    )


def _floats(file: GGUFFile, name: str) -> np.ndarray:
    tensor = file.tensors[name]
    rows = tensor.data.reshape(tensor.rows, -1)
    try:
        values = gguf.quants.dequantize(rows, GGMLQuantizationType(tensor.type))
    except (NotImplementedError, ValueError) as error:
        raise UnsupportedError(
            f"{file.path.name}: {name} has type {tensor.type.name}, which cannot be unpacked here; "
            "start from a file of another type"
        ) from error
    return np.ascontiguousarray(values, np.float32).reshape(tensor.rows, tensor.columns)


def ffn_bytes(file: GGUFFile, layer: int) -> tuple[int, int]:
    """Bytes of a layer's feed-forward matrices, and of the one of them whose rows a predictor saves."""
    parts = (names.FFN_GATE, names.FFN_UP, names.FFN_DOWN, names.FFN_DOWN_T)
    found = [
        file.tensors[name].nbytes for part in parts if (name := names.weight(part, layer)) in file.tensors
    ]
    return sum(found), found[0]


class _Stored:
    """A fit on disk, until the budget is divided."""

    def __init__(self, found: Fit, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by load()
        for array in (found.fc1, found.fc2, found.covariance.astype(np.float32), found.cross):
            np.save(self._file, array)

    def load(self) -> Fit:
        self._file.seek(0)
        fc1, fc2, covariance, cross = (np.load(self._file) for _ in range(4))
        self._file.close()
        return Fit(fc1, fc2, covariance.astype(np.float64), cross)


def make_predictors(
    file: GGUFFile,
    rows: Rows,
    activation: str,
    wish: Wish,
    folder: Path,
    *,
    tick: Tick,
    train: Train | None = None,
) -> list[Layer]:
    """Predictors of all layers.

    rows : of `pyinfer_convert.calibration.collect`;  folder : for what does not fit into memory
    tick : called with (done, total) steps;  train : of `train_predictor`, or None for the closed form
    raises InputError for a budget below the smallest predictors
    """
    n_layers = sum(name.endswith(f".{names.FFN_UP}.weight") for name in file.tensors)
    width = file.tensors[names.weight(names.FFN_UP, 0)].columns
    if width < RANK_STEP:
        raise UnsupportedError(f"{file.path.name}: rows of {width}, predictors need {RANK_STEP} or more")
    sizes = [ffn_bytes(file, layer) for layer in range(n_layers)]
    budget = wish.budget * sum(whole for whole, _ in sizes)
    ranks = candidate_ranks(width, budget / (n_layers * _bytes_of(wish, width, rows.n_neurons, 1)))
    least = n_layers * round(_bytes_of(wish, width, rows.n_neurons, ranks[0]))
    if least > budget:
        share = least / sum(whole for whole, _ in sizes)
        raise InputError(
            f"the smallest predictors take {share:.1%} of the feed-forward layers' bytes, but the budget is "
            f"{wish.budget:.1%}; give --budget {share + 0.0005:.3f} or more"
        )
    stored, curves, total = [], [], 2 * n_layers
    for layer in range(n_layers):
        found, shares = _best_fit(rows, layer, gate_of(file, layer, activation), ranks, wish.recall)
        curves.append(
            [
                Candidate(rank, round(_bytes_of(wish, width, rows.n_neurons, rank)), share * sizes[layer][1])
                for rank, share in zip(ranks, shares)
            ]
        )
        stored.append(_Stored(found, folder))
        tick(layer + 1, total)
    made = []
    for layer, place in enumerate(divide_budget(curves, budget)):
        made.append(_finish(stored[layer].load(), rows, layer, ranks[place], wish, train))
        tick(n_layers + layer + 1, total)
    return made


def _bytes_of(wish: Wish, width: int, n_neurons: int, rank: int) -> float:
    return rank * sum(
        count * BLOCK[type_][1] / BLOCK[type_][0]
        for count, type_ in zip((width, n_neurons), _types(wish.type, width))
    )


def _types(wanted: GGMLType, width: int) -> tuple[GGMLType, GGMLType]:
    """Of fc1, whose rows have `width` numbers, and fc2, whose rows are whole blocks."""
    return (wanted if width % BLOCK[wanted][0] == 0 else LADDER[wanted]), wanted


def _best_fit(rows: Rows, layer: int, gate: Gate, ranks: list[int], recall: float) -> tuple[Fit, list[float]]:
    """The fit that predicts the fewest neurons on held-out text, and its shares for all ranks.

    Few rows for a wide layer leave more noise in clipped moments than clipping is worth.
    """
    learned = moments(lambda: rows.chunks(layer, "fit"), gate)
    middle = ranks[len(ranks) // 2]
    found = [learned.fit(ranks[-1], weight) for weight in STRAIGHT]
    shares = [_predicted_shares(each, rows, layer, [middle], recall)[0] for each in found]
    best = found[int(np.argmin(shares))]
    return best, _predicted_shares(best, rows, layer, ranks, recall)


def _predicted_shares(found: Fit, rows: Rows, layer: int, ranks: list[int], recall: float) -> list[float]:
    """How many neurons would be computed with predictors of each rank, as a share."""
    parts = list(rows.chunks(layer, "choose", SEARCH_TOKENS))
    fired = np.concatenate([fired for _, fired in parts])
    small = np.concatenate([x for x, _ in parts]) @ found.fc1.T
    score, last, shares = np.zeros(fired.shape, np.float32), 0, []
    for rank in ranks:
        score += small[:, last:rank] @ found.fc2[:, last:rank].T
        last = rank
        odds = calibrate(score, fired, SEARCH_STEPS).odds(score)
        shares.append(float((odds >= level_at_recall(odds, fired, recall)).mean()))
    return shares


def _finish(found: Fit, rows: Rows, layer: int, rank: int, wish: Wish, train: Train | None) -> Layer:
    """Round a predictor to the file's types, choose its thresholds, measure it."""
    first, second = _types(wish.type, found.fc1.shape[1])
    if train is None:
        form, fc1 = LINEAR, Matrix(found.first(rank), first)
        fc2 = Matrix(found.second(fc1.values), second)
    else:
        form = wish.form
        trained = train(found, rank, lambda: rows.chunks(layer, "fit"))
        fc1, fc2 = Matrix(trained[0], first), Matrix(trained[1], second)
    parts = list(rows.chunks(layer, "choose", max(SEARCH_TOKENS, CHOOSE_ELEMENTS // rows.n_neurons)))
    fired = np.concatenate([fired for _, fired in parts])
    score = np.concatenate([scores(x, fc1.values, fc2.values, form) for x, _ in parts])
    calibration = calibrate(score, fired)
    level = level_at_recall(calibration.odds(score), fired, 1 - (1 - wish.recall) * (1 - MARGIN))
    thresholds = calibration.thresholds(level)
    tally = Tally()
    for x, fired in rows.chunks(layer, "measure"):
        tally.add(scores(x, fc1.values, fc2.values, form) >= thresholds, fired)
    quality = PredictorQuality(
        rank=rank, form=form, input=NORM, threshold=level, tokens=rows.tokens["measure"], **tally.shares()
    )
    return Layer(fc1, fc2, thresholds, quality)
