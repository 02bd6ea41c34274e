"""How good and how sparse a student of `relufy` is, on text that no training step saw, in float32."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyinfer_tools.relufy_model import Llama

_ROWS = 4


@dataclass(frozen=True)
class Quality:
    """Perplexity over the text, and the share of gates that are exactly zero: per layer, and of all."""

    perplexity: float
    zero_per_layer: list[float]
    tokens: int

    @property
    def zero(self) -> float:
        return sum(self.zero_per_layer) / max(1, len(self.zero_per_layer))


def measure(model: Llama, rows: np.ndarray, threads: int = 1) -> Quality:
    """Score tokens [rows, context]: each but the first from those before it; gates at every position."""
    starts = range(0, len(rows), _ROWS)
    with ThreadPoolExecutor(threads) as pool:
        parts = list(pool.map(lambda start: _measure_piece(model, rows[start : start + _ROWS]), starts))
    scored = len(rows) * (rows.shape[1] - 1)
    zero = [] if model.theta is None else (1 - sum(p[1] for p in parts).mean(1) / rows.size).tolist()
    return Quality(math.exp(sum(p[0] for p in parts) / scored), zero, scored)


@torch.inference_mode()
def _measure_piece(model: Llama, rows: np.ndarray) -> tuple[float, Tensor]:
    tokens = torch.from_numpy(np.array(rows)).long().to(model.embedding.device)
    state, fired = model(tokens)
    logits = F.linear(state[:, :-1].flatten(0, 1), model.head_matrix)
    nll = F.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="none")
    return float(nll.double().sum()), fired.double().cpu()
