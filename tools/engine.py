"""pyinfer as the tools see it: a model with one session, and the timed runs that Peer offers too."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from pyinfer.errors import InputError
from pyinfer.progress import Progress
from pyinfer_tools.llama_cpp import random_tokens

if TYPE_CHECKING:
    from pyinfer.runtime.loader import Model
    from pyinfer.runtime.session import Session


@contextlib.contextmanager
def open_session(
    model: str, n_ctx: int, n_threads: int | None, n_sequences: int = 1, sparsity: str = "auto"
) -> Iterator[tuple[Model, Session]]:
    """Find and load a model, with progress on stderr, and open a session on it; closes both."""
    # Numba takes half a second to import, which a command's --help should not pay.
    from pyinfer.model_store import find_model
    from pyinfer.runtime.loader import load_model
    from pyinfer.runtime.session import Session

    with Progress(sys.stderr, "fetching") as progress:
        path = find_model(model, progress=progress)
    with Progress(sys.stderr, "loading") as progress:
        loaded = load_model(path, progress=progress, sparsity=sparsity)
    try:
        session = Session(loaded, n_ctx, n_threads, n_sequences)
        try:
            yield loaded, session
        finally:
            session.close()
    finally:
        loaded.close()


class Engine:
    """Timed runs on a session, with the same tokens and methods as Peer."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def prefill_run(self, n_tokens: int) -> float:
        """Seconds for a prompt of `n_tokens` into an empty cache."""
        self._check_fit(n_tokens)
        ids = random_tokens(n_tokens, self._session.n_vocab)
        self._session.truncate(0)
        start = time.perf_counter()
        self._session.prefill(ids)
        return time.perf_counter() - start

    def decode_run(
        self, n_tokens: int, limit_seconds: float = float("inf"), n_sequences: int = 1
    ) -> tuple[int, float]:
        """Steps from an empty cache, a token per sequence: (steps done, seconds); stops at the limit."""
        self._check_fit(n_tokens)
        sequences = list(range(n_sequences))
        for sequence in sequences:
            self._session.truncate(0, sequence)
        ids = random_tokens(n_tokens * n_sequences, self._session.n_vocab).reshape(n_tokens, n_sequences)
        start = time.perf_counter()
        for done, tokens in enumerate(ids.tolist(), 1):
            self._session.step(tokens, sequences)
            if time.perf_counter() - start > limit_seconds:
                return done, time.perf_counter() - start
        return n_tokens, time.perf_counter() - start

    def _check_fit(self, n_tokens: int) -> None:
        if not 0 < n_tokens <= self._session.n_ctx:
            raise InputError(f"{n_tokens} tokens do not fit; this context holds 1 to {self._session.n_ctx}")


def token_bytes(model: Model) -> int:
    """Bytes of weights that one token of decode reads: matrices as they lie in memory, where some types take
    more room than in the file, vectors, and one row of each matrix that stays in the file.
    """
    weights = model.weights
    in_memory = sum(matrix.n_bytes for matrix in weights.matrices.values())
    vectors = sum(vector.nbytes for vector in weights.vectors.values())
    rows = [op.weight for op in model.program.ops if op.name in ("embed", "embed_position")]
    return in_memory + vectors + sum(tensor.nbytes // tensor.rows for tensor in rows)


def median(values: list[float]) -> float:
    """The middle value, the mean of the two middle ones of an even number."""
    return float(np.median(values))
