"""Predictors in closed form: two small matrices that guess from a layer's input which neurons fire.

What matters of a gate is its side of the threshold: the margin z = (gate - threshold) / deviation is clipped
to [-1, 1/4] and regressed on the input under a rank constraint (reduced-rank regression: whiten the input by
its covariance, then a singular value decomposition). Clipped moments have noise where rows are few for the
width; those of the margin as it is have none, and held-out text says what mixture of both to take.

Every neuron's score then becomes a probability of its own (Platt's logistic scaling), so that one level per
layer is the best trade between recall and work; it is stored as a threshold per neuron.

Source: Izenman 1975 (reduced-rank regression); DejaVu, arXiv 2310.17157 (the predictors, and the weighting of
the loss); PowerInfer, arXiv 2312.12456, section 5.1 (size by layer).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from pyinfer.errors import InputError

CLIP_BELOW, CLIP_ABOVE = -1.0, 0.25  # margins in deviations; of [-3..-0.5] x [0..1] the best, measured
STOPPED = -0.5  # target of a neuron with an open gate that did not fire: dReLU's other half is shut
EIGENVALUE_FLOOR = 1e-7  # of the largest; directions below are noise that whitening would blow up
QUIET_WEIGHT = 0.1  # of a neuron that did not fire: recall comes first, as in DejaVu's loss
NEURONS_AT_ONCE = 1024
INT8_BLOCK = 32  # of the runtime's activations

Chunks = Callable[[], Iterable[tuple[np.ndarray, np.ndarray]]]  # x float32 [n, D], fired bool [n, F]


@dataclass(frozen=True)
class Gate:
    """What decides whether a neuron fires: weight float32 [F, D] of the gate (or of up, where there is none).

    bias : float32 [F] or 0;  threshold : of the activation: 0, or T of fatrelu:T
    """

    weight: np.ndarray
    bias: np.ndarray | float = 0.0
    threshold: float = 0.0

    def margin(self, x: np.ndarray) -> np.ndarray:
        return x @ self.weight.T + (self.bias - self.threshold)


@dataclass(frozen=True)
class Fit:
    """A regression of all ranks at once: the first r rows of `fc1` and columns of `fc2` are the best for r.

    fc1 : float32 [R, D];  fc2 : float32 [F, R]
    covariance : float64 [D, D] of the input;  cross : float32 [F, D] of target and input
    """

    fc1: np.ndarray
    fc2: np.ndarray
    covariance: np.ndarray
    cross: np.ndarray

    def first(self, rank: int) -> np.ndarray:
        """fc1 float32 [r, D] of one rank, ready to be rounded: blocks like numbers of one size, so it is
        turned by a random rotation. `second` turns fc2 with it.
        """
        rotation = np.linalg.qr(np.random.default_rng(0).standard_normal((rank, rank)))[0]
        return (rotation @ self.fc1[:rank]).astype(np.float32)

    def second(self, fc1: np.ndarray) -> np.ndarray:
        """The best fc2 float32 [F, r] for a given fc1 [r, D], such as one that was rounded."""
        small = fc1.astype(np.float64)
        gram = small @ self.covariance @ small.T
        gram[np.diag_indices(len(gram))] += 1e-9 * np.trace(gram) / len(gram) + 1e-30
        return np.ascontiguousarray(np.linalg.solve(gram, small @ self.cross.T).T, np.float32)


@dataclass(frozen=True, eq=False)
class Moments:
    """What the rows of a layer say: all that fits of any rank need.

    covariance : float64 [D, D] of the input
    clipped : float32 [F, D], cross moments of clipped margins and input, from the rows
    straight : the same of margins as they are, each neuron's on the scale of its clipped one. It follows from
        the covariance and the gate, so it has none of the noise that few rows leave in `clipped`
    """

    covariance: np.ndarray
    clipped: np.ndarray
    straight: np.ndarray

    @cached_property
    def _whiten(self) -> np.ndarray:
        values, vectors = np.linalg.eigh(self.covariance)
        return vectors / np.sqrt(np.maximum(values, max(values[-1], 1e-30) * EIGENVALUE_FLOOR))

    def fit(self, rank: int, straight: float = 0.0) -> Fit:
        """Predictors of all ranks up to `rank` (at most D); `straight` weighs those, 0 to 1."""
        cross = self.clipped + np.float32(straight) * (self.straight - self.clipped)
        whitened = cross @ self._whiten.astype(np.float32)
        squares, right = np.linalg.eigh(whitened.T @ whitened)
        best = right[:, ::-1][:, :rank]
        # half of each singular value on either side, inner values of about one: halves hold all scales
        root = np.maximum(squares[::-1][:rank] / max(squares[-1], 1e-30), 1e-30) ** 0.25
        fc1 = ((self._whiten @ best) * root).T
        fc2 = (whitened @ best) / root
        return Fit(fc1.astype(np.float32), fc2.astype(np.float32), self.covariance, cross)


def moments(chunks: Chunks, gate: Gate) -> Moments:
    """Of two passes over `chunks`. Raises InputError for no rows, or numbers that are not finite."""
    mean, covariance, count = _of_inputs(chunks, gate.weight.shape[1])
    reached = gate.weight @ covariance.astype(np.float32)
    deviation = np.sqrt(np.maximum(np.einsum("fd,fd->f", reached, gate.weight), 0))
    scale = 1 / np.maximum(deviation, np.float32(1e-12))
    clipped = np.zeros(gate.weight.shape, np.float32)
    for x, fired in chunks():
        target = _target(gate.margin(x) * scale, fired)
        clipped += target.T @ (x - mean.astype(np.float32))
    clipped /= np.float32(count)
    if not np.isfinite(clipped).all():
        raise InputError("the gates of this layer are not finite, expected numbers; is the model damaged?")
    straight = reached * scale[:, None]
    slope = np.einsum("fd,fd->f", clipped, gate.weight) * scale  # of the clipped margin on the margin
    return Moments(covariance, clipped, straight * np.maximum(slope, 0)[:, None])


def _of_inputs(chunks: Chunks, width: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Mean [D], covariance [D, D] and number of rows."""
    count, total, gram = 0, np.zeros(width), np.zeros((width, width))
    for x, _ in chunks():
        count += len(x)
        total += x.sum(0, dtype=np.float64)
        gram += x.T @ x
    if not count or not np.isfinite(total).all() or not np.isfinite(gram).all():
        found = "no tokens" if not count else "inputs that are not finite"
        raise InputError(f"{found} to fit a predictor to, expected rows of numbers")
    mean = total / count
    return mean, gram / count - np.outer(mean, mean), count


def _target(margin: np.ndarray, fired: np.ndarray) -> np.ndarray:
    target = np.clip(margin, np.float32(CLIP_BELOW), np.float32(CLIP_ABOVE))
    np.copyto(target, np.float32(STOPPED), where=~fired & (margin > 0))
    return target


def scores(x: np.ndarray, fc1: np.ndarray, fc2: np.ndarray, form: str) -> np.ndarray:
    """float32 [n, F] as the runtime computes them: `form` relu or linear, activations in 8 bits."""
    small = as_int8(x) @ fc1.T
    if form == "relu":
        small = np.maximum(small, 0)
    return as_int8(small) @ fc2.T


def as_int8(x: np.ndarray) -> np.ndarray:
    """x [n, D] rounded to 8 bits with a scale per 32 columns, as activations are multiplied."""
    blocks = x.reshape(len(x), -1, INT8_BLOCK) if x.shape[1] % INT8_BLOCK == 0 else x[:, None, :]
    scale = np.maximum(np.abs(blocks).max(2, keepdims=True), np.float32(1e-30)) / np.float32(127)
    return (np.rint(blocks / scale) * scale).reshape(x.shape)


@dataclass(frozen=True)
class Calibration:
    """log-odds that neuron f fires = slope[f] * score + offset[f]; float32 [F], slopes are positive."""

    slope: np.ndarray
    offset: np.ndarray

    def odds(self, score: np.ndarray) -> np.ndarray:
        return score * self.slope + self.offset

    def thresholds(self, level: float) -> np.ndarray:
        """float32 [F]: the scores from which the log-odds reach `level`."""
        return ((level - self.offset) / self.slope).astype(np.float32)


def calibrate(score: np.ndarray, fired: np.ndarray, steps: int = 10) -> Calibration:
    """Fit a logistic curve to each neuron's scores [n, F] by Newton's method, those that did not fire
    weighted by QUIET_WEIGHT. Neurons that fire (nearly) never or always keep the prior's slope.
    """
    parts = [
        _platt(score[:, part], fired[:, part], steps) for part in _slices(score.shape[1], NEURONS_AT_ONCE)
    ]
    slope, offset = (np.concatenate(each) for each in zip(*parts))
    return Calibration(slope, offset)


def _slices(total: int, step: int) -> Iterator[slice]:
    return (slice(first, min(first + step, total)) for first in range(0, total, step))


def _platt(score: np.ndarray, fired: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray]:
    mean, deviation = score.mean(0), score.std(0) + np.float32(1e-12)
    z = (score - mean) / deviation
    slope = np.full(z.shape[1], 2, np.float32)  # of a prior as strong as half a row
    offset = np.full(z.shape[1], -1, np.float32)
    weight = np.where(fired, np.float32(1), np.float32(QUIET_WEIGHT))
    ridge = np.float32(0.1)
    for _ in range(steps):
        chance = 1 / (1 + np.exp(-np.clip(slope * z + offset, -30, 30)))
        error, curve = weight * (chance - fired), weight * chance * (1 - chance)
        to_slope = (error * z).sum(0) + ridge * (slope - 2)
        to_offset = error.sum(0) + ridge / 10 * (offset + 1)
        first, mixed, last = (curve * z * z).sum(0) + ridge, (curve * z).sum(0), curve.sum(0) + ridge / 10
        room = np.maximum(first * last - mixed * mixed, np.float32(1e-12))
        slope = slope - np.clip((last * to_slope - mixed * to_offset) / room, -1, 1)
        offset = offset - np.clip((first * to_offset - mixed * to_slope) / room, -2, 2)
        slope = np.clip(slope, np.float32(0.05), np.float32(50))
    return slope / deviation, offset - slope * mean / deviation


def level_at_recall(odds: np.ndarray, fired: np.ndarray, recall: float) -> float:
    """The highest level that `recall` of all firings reach; -inf where nothing fired."""
    reached = odds[fired]
    if not len(reached):
        return float("-inf")
    allowed = min(int((1 - recall) * len(reached)), len(reached) - 1)
    return float(np.partition(reached, allowed)[allowed])
