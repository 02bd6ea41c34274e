"""How the feed-forward layers of a program are computed: what `Builder.ffn` asks, and nothing else knows.

Who decides is `pyinfer.neurons.sparsity`; without a decision every layer is dense.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

DENSE, EXACT, PREDICTED = "dense", "exact", "predicted"
OBSERVED = ("fired", "histogram", "rows", "stats")
# What "stats" counts, in steps of few rows only: neurons whose gate was computed, those that fired, and those
# that would have fired without a predictor; beside those, the hot ones that fired.
STATS = ("computed", "used", "truth", "hot")
LEAST_HOT = 256  # neurons; fewer are as well among the others
HOT_STEP = 32  # prompts quantize what goes into down by so many neurons
HISTOGRAM_BINS = 4096
HISTOGRAM_SHIFT = 19  # a bin is the upper 12 bits below the sign of |act(gate)|: 16 bins per octave


@dataclass(frozen=True)
class LayerPlan:
    """How one layer is computed.

    mode : dense; exact (activation first, then only neurons that fired); predicted (only neurons whose score
        reaches its threshold, and of those again only the ones that fired)
    keep : activations smaller than this count as not fired (CATS, arXiv 2404.08763); 0 loses nothing
    thresholds : float32 [F], predicted only; -inf: always computed (a hot neuron)
    form : of the predictor: relu, fc2 . relu(fc1 . x), as PowerInfer's; or linear, fc2 . (fc1 . x)
    input : of the predictor: norm, what the layer reads; or raw, the residual before its norm
    apart : hot neurons may be computed by themselves, as the layer's down is kept neuron by neuron
    """

    mode: str = DENSE
    keep: float = 0.0
    thresholds: np.ndarray | None = None
    form: str = "relu"
    input: str = "norm"
    apart: bool = False

    @property
    def hot(self) -> np.ndarray:
        """Neurons that no predictor is asked about, when they are worth a computation of their own."""
        if self.thresholds is None or not self.apart:
            return np.zeros(0, np.int64)
        found = np.flatnonzero(np.isneginf(self.thresholds))
        worth = LEAST_HOT <= len(found) < len(self.thresholds)  # of all there would be none left to predict
        return found[: len(found) // HOT_STEP * HOT_STEP if worth else 0]


@dataclass(frozen=True)
class FFNPlan:
    """Plans of all layers, and what is observed while they run (one of OBSERVED, or None)."""

    layers: tuple[LayerPlan, ...] = ()
    observe: str | None = None

    def layer(self, index: int | None) -> LayerPlan:
        return self.layers[index] if self.layers and index is not None else LayerPlan()

    @property
    def modes(self) -> set[str]:
        return {each.mode for each in self.layers} or {DENSE}
