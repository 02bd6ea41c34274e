"""llama.cpp behind a few calls, for comparisons: its C API, so that no Python loop is timed.

Needs llama-cpp-python (extra `[peers]`), built natively from its source distribution to be fair:
`CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python llama-cpp-python`.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyinfer.errors import FormatError, InputError, MissingExtraError, ModelNotFoundError
from pyinfer_tools.scoring import Score, chunk_count, chunks, scored_blocks

try:
    import llama_cpp as c_api
except ImportError:
    c_api = None

_BATCH = 512  # tokens per llama_decode call, physical and logical; what llama-bench uses for its figures


@dataclass(frozen=True)
class Greedy:
    """Greedy continuation: token ids, and per step the gap between the best and the second-best logit."""

    ids: list[int]
    gaps: list[float]


class Peer:
    """One model and one context of llama.cpp, on the CPU, single sequence.

    path: GGUF file; n_ctx: context in tokens; n_threads: for prefill and decode alike; exact: f32 cache and
    plain attention, for checking numbers, instead of the faster f16 of the default.
    Raises MissingExtraError without llama-cpp-python, ModelNotFoundError, FormatError when llama.cpp
    refuses the file.
    """

    def __init__(
        self, path: str | Path, n_ctx: int = 2048, n_threads: int = 2, *, exact: bool = False
    ) -> None:
        if c_api is None:
            raise MissingExtraError(
                "llama-cpp-python is not installed, comparing with llama.cpp needs it; "
                "run: CMAKE_ARGS=-DGGML_NATIVE=ON pip install --no-binary llama-cpp-python 'pyinfer[peers]'"
            )
        if not Path(path).is_file():
            raise ModelNotFoundError(f"{path}: no such file")
        _silence(c_api)
        c_api.llama_backend_init()
        self._model = c_api.llama_model_load_from_file(str(path).encode(), _model_params(c_api))
        if not self._model:
            raise FormatError(f"{path}: llama.cpp cannot load this file")
        params = c_api.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = n_ctx, _BATCH, _BATCH
        params.n_threads = params.n_threads_batch = n_threads
        params.no_perf = True
        if exact:
            params.type_k = params.type_v = c_api.GGML_TYPE_F32
            params.flash_attn_type = c_api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._context = c_api.llama_init_from_model(self._model, params)
        if not self._context:
            raise InputError(f"{path}: llama.cpp cannot make a context of {n_ctx} tokens; use a smaller one")
        self._vocab = c_api.llama_model_get_vocab(self._model)
        self._batch = c_api.llama_batch_init(_BATCH, 0, 1)
        self.n_ctx = n_ctx
        self.n_threads = n_threads
        self.n_vocab: int = c_api.llama_vocab_n_tokens(self._vocab)
        self.add_bos: bool = c_api.llama_vocab_get_add_bos(self._vocab)
        self.bos_id: int = c_api.llama_vocab_bos(self._vocab)

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        """Give all memory back; calling it twice is harmless."""
        if self._model:
            c_api.llama_batch_free(self._batch)
            c_api.llama_free(self._context)
            c_api.llama_model_free(self._model)
            self._model = self._context = None

    def tokenize(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """Tokens of a text. bos: add what the model wants around it; special: parse control tokens."""
        data = text.encode()
        room = len(data) + 8
        ids = (c_api.llama_token * room)()
        count = c_api.llama_tokenize(self._vocab, data, len(data), ids, room, bos, special)
        if count < 0:
            raise InputError(f"llama.cpp makes {-count} tokens of {len(data)} bytes, expected at most {room}")
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        """The bytes of one token; control tokens as their text."""
        buffer = ctypes.create_string_buffer(256)
        count = c_api.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[: max(0, count)]

    def clear(self) -> None:
        """Forget all tokens."""
        c_api.llama_memory_clear(c_api.llama_get_memory(self._context), False)

    def decode_run(self, n_tokens: int, limit_seconds: float = float("inf")) -> tuple[int, float]:
        """Single-token steps from an empty cache, as llama-bench's tg: (steps done, seconds); stops early at
        the limit.
        """
        self._check_fit(n_tokens)
        ids = random_tokens(n_tokens, self.n_vocab)
        self.clear()
        one = (c_api.llama_token * 1)()
        batch = c_api.llama_batch_get_one(one, 1)
        seconds = 0.0
        for done, token in enumerate(ids, 1):
            one[0] = int(token)
            start = time.perf_counter()
            status = c_api.llama_decode(self._context, batch)
            c_api.llama_synchronize(self._context)
            seconds += time.perf_counter() - start
            self._check_status(status)
            if seconds > limit_seconds:
                return done, seconds
        return n_tokens, seconds

    def prefill_run(self, n_tokens: int) -> float:
        """Seconds of one prompt into an empty cache, as llama-bench's pp."""
        self._check_fit(n_tokens)
        ids = random_tokens(n_tokens, self.n_vocab)
        self.clear()
        tokens = (c_api.llama_token * len(ids))(*ids.tolist())
        seconds = 0.0
        for start in range(0, len(ids), _BATCH):
            count = min(_BATCH, len(ids) - start)
            part = ctypes.cast(ctypes.byref(tokens, 4 * start), ctypes.POINTER(c_api.llama_token))
            batch = c_api.llama_batch_get_one(part, count)
            begin = time.perf_counter()
            status = c_api.llama_decode(self._context, batch)
            c_api.llama_synchronize(self._context)
            seconds += time.perf_counter() - begin
            self._check_status(status)
        return seconds

    def append(self, tokens: Sequence[int] | np.ndarray, position: int, first: int) -> np.ndarray:
        """Append tokens [T] at `position`; logits float32 [position + T - first, V] from `first` on."""
        parts = [np.empty((0, self.n_vocab), np.float32)]
        for start in range(0, len(tokens), _BATCH):
            part = np.asarray(tokens[start : start + _BATCH], np.int32)
            parts.append(self._append_batch(part, position + start, first))
        return np.concatenate(parts)

    def _append_batch(self, tokens: np.ndarray, position: int, first: int) -> np.ndarray:
        batch, count = self._batch, len(tokens)
        wanted = np.arange(position, position + count) >= first
        batch.n_tokens = count
        np.ctypeslib.as_array(batch.token, (count,))[:] = tokens
        np.ctypeslib.as_array(batch.pos, (count,))[:] = np.arange(position, position + count)
        np.ctypeslib.as_array(batch.n_seq_id, (count,))[:] = 1
        np.ctypeslib.as_array(batch.logits, (count,))[:] = wanted
        for row in range(count):
            batch.seq_id[row][0] = 0
        self._check_status(c_api.llama_decode(self._context, batch))
        rows = int(wanted.sum())
        if not rows:
            return np.empty((0, self.n_vocab), np.float32)
        flat = np.ctypeslib.as_array(c_api.llama_get_logits(self._context), (rows * self.n_vocab,))
        return flat.reshape(rows, self.n_vocab).copy()

    def logits(self, tokens: Sequence[int], first: int = 0) -> np.ndarray:
        """Logits float32 [T - first, V] of a text from an empty cache."""
        self._check_fit(len(tokens))
        self.clear()
        return self.append(tokens, 0, first)

    def greedy(self, tokens: Sequence[int], n_tokens: int) -> Greedy:
        """The `n_tokens` likeliest tokens one after another, going on behind end tokens."""
        self._check_fit(len(tokens) + n_tokens)
        row = self.logits(tokens, len(tokens) - 1)[-1]
        ids, gaps = [], []
        while True:
            ids.append(int(row.argmax()))
            second, best = np.partition(row, -2)[-2:]
            gaps.append(float(best - second))
            if len(ids) == n_tokens:
                return Greedy(ids, gaps)
            position = len(tokens) + len(ids) - 1
            row = self.append(ids[-1:], position, position)[-1]

    def perplexity(
        self,
        tokens: Sequence[int],
        n_ctx: int = 512,
        n_chunks: int | None = None,
        progress: Callable[[int, int, Score], None] | None = None,
    ) -> Score:
        """Perplexity as llama-perplexity computes it; progress(chunks done, chunks, score so far)."""
        total = chunk_count(tokens, n_ctx, n_chunks)
        self._check_fit(n_ctx)
        score = Score()
        for done, chunk in enumerate(chunks(tokens, n_ctx, total, self.bos_id if self.add_bos else None), 1):
            self.clear()
            position = 0
            for start, stop in scored_blocks(n_ctx, self.n_vocab):
                score.add(self.append(chunk[position:stop], position, start), chunk[start + 1 : stop + 1])
                position = stop
            if progress:
                progress(done, total, score)
        return score

    def _check_fit(self, n_tokens: int) -> None:
        if not 0 < n_tokens <= self.n_ctx:
            raise InputError(
                f"{n_tokens} tokens asked for, the context of this comparison holds 1 to {self.n_ctx}"
            )

    def _check_status(self, status: int) -> None:
        if status != 0:
            raise InputError(f"llama_decode answers {status}, expected 0; 1 means a full context")


def version() -> str:
    """Version of llama-cpp-python, or "none"."""
    return c_api.__version__ if c_api else "none"


def system_info() -> str:
    """What llama.cpp was built for, e.g. "AVX512_VNNI = 1": proof of a native build."""
    return c_api.llama_print_system_info().decode().strip(" |\n") if c_api else "none"


def random_tokens(n_tokens: int, n_vocab: int) -> np.ndarray:
    """The token ids that every measurement uses, the same for all engines: int32 [n_tokens]."""
    return np.random.default_rng(1).integers(0, n_vocab, n_tokens, dtype=np.int32)


def _model_params(api):
    params = api.llama_model_default_params()
    params.n_gpu_layers = 0
    # The field was renamed in 2026; both mean: map the file.
    if hasattr(params, "load_mode"):
        params.load_mode = api.LLAMA_LOAD_MODE_MMAP
    else:
        params.use_mmap = True
    return params


_log_callbacks = []  # llama.cpp keeps only the address, so the object has to stay alive


def _silence(api) -> None:
    if not _log_callbacks:
        _log_callbacks.append(api.llama_log_callback(lambda level, text, data: None))
        api.llama_log_set(_log_callbacks[0], ctypes.c_void_p(0))
