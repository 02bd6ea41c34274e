"""Perplexity by llama.cpp's method, as arithmetic over logits: what is scored, the figure and its error.

The text is cut into chunks of `n_ctx` tokens. Of each chunk the second half is scored, so that every scored
token has at least `n_ctx / 2` tokens before it. If the model wants a BOS token, it replaces the first token
of every chunk.

Source: llama.cpp, tools/perplexity/perplexity.cpp.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np

from pyinfer.errors import InputError

_LOGITS_BYTES = 64 << 20  # most logits a caller should hold at once
_DOUBLES = 1 << 20  # most logits that are turned into float64 at once


class Score:
    """Sum of negative log-likelihoods; perplexity and its standard error at any time."""

    def __init__(self) -> None:
        self.tokens = 0
        self._nll = 0.0
        self._nll_squared = 0.0

    def add(self, logits: np.ndarray, targets: np.ndarray) -> None:
        """Score logits [T, V] against the tokens [T] that really came next."""
        rows = max(1, _DOUBLES // logits.shape[1])
        for start in range(0, len(targets), rows):
            part = logits[start : start + rows].astype(np.float64)
            part -= part.max(axis=1, keepdims=True)
            picked = part[np.arange(len(part)), targets[start : start + rows]]
            nll = np.log(np.exp(part).sum(axis=1)) - picked
            self._nll += float(nll.sum())
            self._nll_squared += float((nll * nll).sum())
        self.tokens += len(targets)

    @property
    def nll(self) -> float:
        """Sum of the negative log-likelihoods so far."""
        return self._nll

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood; NaN before the first token."""
        return math.exp(self._nll / self.tokens) if self.tokens else math.nan

    @property
    def error(self) -> float:
        """Standard error of the perplexity; NaN before the second token."""
        if self.tokens < 2:
            return math.nan
        mean = self._nll / self.tokens
        variance = max(0.0, self._nll_squared / self.tokens - mean * mean)
        return math.sqrt(variance / (self.tokens - 1)) * self.perplexity


def chunk_count(tokens: Sequence[int], n_ctx: int, n_chunks: int | None) -> int:
    """How many chunks there are to score.

    Raises InputError for a context that cannot be halved or a text of less than two contexts.
    """
    if n_ctx < 4:
        raise InputError(f"a perplexity context of {n_ctx} tokens is too short; use at least 4")
    if len(tokens) < 2 * n_ctx:
        raise InputError(
            f"the text has {len(tokens)} tokens, a context of {n_ctx} needs at least {2 * n_ctx}; "
            "use a longer text or a smaller context"
        )
    available = len(tokens) // n_ctx
    return available if n_chunks is None else max(1, min(n_chunks, available))


def chunks(tokens: Sequence[int], n_ctx: int, n_chunks: int, bos: int | None) -> Iterator[np.ndarray]:
    """The chunks as int32 [n_ctx]; `bos` replaces each first token unless it is None."""
    for index in range(n_chunks):
        chunk = np.array(tokens[index * n_ctx : (index + 1) * n_ctx], np.int32)
        if bos is not None:
            chunk[0] = bos
        yield chunk


def scored_blocks(n_ctx: int, n_vocab: int, most_rows: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges of positions whose logits are wanted, ascending, at most 64 MiB of logits and most_rows each.

    Together they cover n_ctx / 2 .. n_ctx - 2; position p predicts token p + 1.
    """
    rows = max(1, _LOGITS_BYTES // (4 * n_vocab))
    rows = min(rows, most_rows or rows)
    for start in range(n_ctx // 2, n_ctx - 1, rows):
        yield start, min(start + rows, n_ctx - 1)
