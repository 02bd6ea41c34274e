"""A session: a model with threads and a KV cache, which turns tokens into logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from pyinfer.cpu.executor import Executor
from pyinfer.errors import CapacityError, ContextFullError, InputError
from pyinfer.jit.team import MOST_THREADS, Team
from pyinfer.runtime.loader import Model, default_threads

CHUNK_ROWS, CHUNK_ROWS_LARGE, LARGE_BYTES = (
    512,
    128,
    1 << 30,
)  # a chunk cannot be cancelled: it should take a second or two


class Session:
    """KV caches for `n_sequences` sequences of `n_ctx` tokens. Not for several threads at once: the caller
    locks.
    """

    def __init__(self, model: Model, n_ctx: int, n_threads: int | None = None, n_sequences: int = 1) -> None:
        if n_ctx < 1:
            raise InputError(f"n_ctx is {n_ctx}, expected at least 1")
        n_threads = default_threads() if n_threads is None else n_threads
        if not 1 <= n_threads < MOST_THREADS:
            raise InputError(f"n_threads is {n_threads}, expected 1 to {MOST_THREADS - 1}")
        if n_sequences < 1:
            raise InputError(f"n_sequences is {n_sequences}, expected at least 1")
        most = model.program.most_positions
        if most is not None and n_ctx > most:
            raise InputError(
                f"n_ctx is {n_ctx}, expected at most the {most} positions that this model learned"
            )
        self.model, self.n_ctx, self.n_threads = model, n_ctx, n_threads
        self.n_vocab = model.program.vocab_size
        self._team = Team(n_threads)
        chunk = CHUNK_ROWS if model.weights.nbytes < LARGE_BYTES else CHUNK_ROWS_LARGE
        capacity = max(min(chunk, n_ctx), n_sequences)
        try:
            self._executor = Executor(model.program, model.weights, self._team, n_ctx, n_sequences, capacity)
        except MemoryError as error:
            raise CapacityError(
                f"no memory for a context of {n_ctx} tokens ({n_sequences} times): {error}; "
                "use a smaller n_ctx"
            ) from error
        self._lengths = [0] * n_sequences

    @property
    def chunk_rows(self) -> int:
        """The most tokens of a prefill that run in one step."""
        return self._executor.capacity

    def observed(self, what: str, layer: int) -> np.ndarray:
        """What a model loaded with `observe` saw in a layer (see `pyinfer.program.builder.Builder.ffn`).

        fired: int64 [F], how often each neuron fired; histogram: int64 [4096] of |act(gate)|, both since
        `reset_observed`. x, raw, gate, hidden: float32 [rows, width] of the last step (of one chunk).
        """
        found = self._executor.observed.get(what, layer)
        if found is None:
            raise InputError(f"{what!r} of layer {layer} is not observed; load the model with observe=...")
        return found

    @property
    def few_tokens(self) -> int:
        """Tokens that ran in steps of so few rows that neurons are skipped, since `reset_observed`."""
        return self._executor.observed.few_rows

    def reset_observed(self) -> None:
        self._executor.observed.reset()

    @property
    def cache_bytes(self) -> int:
        return self._executor.cache_bytes

    def length(self, sequence: int = 0) -> int:
        """Tokens now in the KV cache of a sequence."""
        self._check_sequences([sequence])
        return self._lengths[sequence]

    def _check_sequences(self, sequences: Sequence[int]) -> None:
        for sequence in sequences:
            if not 0 <= sequence < len(self._lengths):
                raise InputError(f"sequence is {sequence}, expected 0 to {len(self._lengths) - 1}")

    def _check(self, tokens: np.ndarray) -> None:
        if tokens.size and not 0 <= tokens.min() <= tokens.max() < self.n_vocab:
            raise InputError(
                f"token ids are {tokens.min()} to {tokens.max()}, expected 0 to {self.n_vocab - 1}"
            )

    def prefill(
        self,
        tokens: Sequence[int],
        sequence: int = 0,
        *,
        all_logits: bool = False,
        cancelled: Callable[[], bool] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> np.ndarray | None:
        """Append tokens to a sequence; float32 [V] logits after the last, or [T, V]; None when cancelled
        between chunks.

        Raises ContextFullError when they do not fit, InputError when there are none or an id is not in the
        vocabulary.
        """
        ids = np.asarray(tokens, np.int64)
        self._check_sequences([sequence])
        start, total = self._lengths[sequence], len(ids)
        if not total:
            raise InputError("no tokens to evaluate, expected at least one")
        self._check(ids)
        if start + total > self.n_ctx:
            raise ContextFullError(
                f"{start + total} tokens do not fit the context of {self.n_ctx}; "
                "use a larger one or fewer tokens"
            )
        parts = []
        for first in range(0, total, self._executor.capacity):
            if cancelled is not None and cancelled():
                return None
            part = ids[first : first + self._executor.capacity]
            n, last = len(part), first + self._executor.capacity >= total
            wanted = range(n) if all_logits else [n - 1] if last else []
            positions = np.arange(start + first, start + first + n)
            parts.append(self._executor.step(part, positions, np.full(n, sequence), wanted))
            self._lengths[sequence] = start + first + n
            if progress is not None:
                progress(first + n, total)
        return np.concatenate(parts) if all_logits else parts[-1][0]

    def step(self, tokens: Sequence[int], sequences: Sequence[int]) -> np.ndarray:
        """One token for each of several different sequences; float32 [B, V]."""
        ids = np.asarray(tokens, np.int64)
        self._check(ids)
        self._check_sequences(sequences)
        if not 0 < len(ids) == len(sequences) == len(set(sequences)):
            given = f"{len(ids)} tokens for sequences {list(sequences)}"
            raise InputError(f"{given}, expected one token for each of different sequences")
        positions = [self._lengths[sequence] for sequence in sequences]
        if max(positions) >= self.n_ctx:
            raise ContextFullError(f"the context of {self.n_ctx} tokens is full; use a larger one")
        logits = self._executor.step(ids, positions, sequences, range(len(ids)))
        for sequence in sequences:
            self._lengths[sequence] += 1
        return logits

    def truncate(self, length: int, sequence: int = 0) -> None:
        """Forget everything of a sequence behind `length` tokens."""
        self._check_sequences([sequence])
        self._lengths[sequence] = max(0, min(length, self._lengths[sequence]))

    def close(self) -> None:
        self._team.close()
