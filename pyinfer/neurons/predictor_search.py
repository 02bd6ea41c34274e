"""How large the predictor of each layer should be: one budget, divided where it saves most.

Source: PowerInfer, arXiv 2312.12456, section 5.1: sparse and skewed layers need small predictors. Here that
is not estimated from their sparsity but follows from how many neurons each size would have to compute.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

RANK_STEP = 32  # a block of the quantized types
MOST_CANDIDATES = 16
SCATTERED = 2.0  # a byte of rows picked at random costs about two of rows in order: 34 of 67 GB/s measured


@dataclass(frozen=True)
class Candidate:
    """A size of one layer's predictor: its bytes, and the bytes of gate rows that it leaves to read."""

    rank: int
    predictor_bytes: int
    row_bytes: float


def candidate_ranks(width: int, usual: float) -> list[int]:
    """Ranks to try, multiples of 32, ascending: up to three times the usual one, not above the width."""
    most = max(RANK_STEP, min(int(3 * usual), width) // RANK_STEP * RANK_STEP)
    step = -(-most // (MOST_CANDIDATES * RANK_STEP)) * RANK_STEP
    return sorted({min(rank, most) for rank in range(step, most + step, step)} | {RANK_STEP})


def divide_budget(layers: Sequence[Sequence[Candidate]], budget_bytes: float) -> list[int]:
    """The candidate of each layer, by its place: greedy by bytes saved per byte spent.

    Every layer gets at least its smallest. A step that saves less than it costs is not taken, so part of the
    budget may be left.
    """
    chosen = [0] * len(layers)
    left = budget_bytes - sum(each[0].predictor_bytes for each in layers)
    while True:
        best, best_gain = None, 1.0
        for layer, candidates in enumerate(layers):
            now = candidates[chosen[layer]]
            for place in range(chosen[layer] + 1, len(candidates)):
                cost = candidates[place].predictor_bytes - now.predictor_bytes
                gain = SCATTERED * (now.row_bytes - candidates[place].row_bytes) / cost
                if cost <= left and gain > best_gain:
                    best, best_gain = (layer, place, cost), gain
        if best is None:
            return chosen
        layer, place, cost = best
        chosen[layer] = place
        left -= cost
