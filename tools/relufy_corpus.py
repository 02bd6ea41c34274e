"""What `relufy` trains on: rows of tokens and the teacher's final states there, kept on disk.

A row is the BOS token and context - 1 tokens behind it; states[r, p] is the teacher's normed final state
after tokens[r, : p + 1], as raw bfloat16. Rows are either sampled from the teacher itself (temperature 1, no
cuts) or come from the user's text. Batches are filled in order and counted in a file beside, so a killed run
goes on, and a corpus can grow.
"""

from __future__ import annotations

import json
import os
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from pyinfer.errors import FormatError, InputError
from pyinfer_tools.relufy_files import write_atomically
from pyinfer_tools.relufy_model import Llama

BATCH_ROWS = 128
_BLOCK = 128  # the vocabulary is sampled in two steps: which block, which of its tokens


class Corpus:
    """tokens int32 [rows, context] and states bfloat16 as uint16 [rows, context, D], both mapped files.

    states : None where only the tokens are kept;  rows_done : how many rows are filled so far
    """

    def __init__(self, folder: Path, rows: int, context: int, width: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._counter = folder / "done.json"
        self.tokens = _mapped(folder / "tokens.npy", np.int32, (rows, context))
        self.states = _mapped(folder / "states.npy", np.uint16, (rows, context, width)) if width else None
        self.rows = rows
        self.rows_done = 0
        if self._counter.exists():
            self.rows_done = min(rows, int(json.loads(self._counter.read_text())["rows_done"]))

    def put(self, tokens: Tensor, states: Tensor) -> None:
        """Append rows; they count only once they are on disk."""
        first, stop = self.rows_done, min(self.rows, self.rows_done + len(tokens))
        self.tokens[first:stop] = tokens[: stop - first].cpu().numpy()
        self.tokens.flush()
        if self.states is not None:
            raw = states[: stop - first].to(torch.bfloat16).view(torch.int16).cpu().numpy()
            self.states[first:stop] = raw.view(np.uint16)
            self.states.flush()
        write_atomically(self._counter, json.dumps({"rows_done": stop}).encode())
        self.rows_done = stop


def _mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.memmap:
    if not path.exists():
        return np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    try:
        found = np.lib.format.open_memmap(path, mode="r+")
    except ValueError as error:
        raise FormatError(f"{path}: no array ({error}); start anew with --fresh") from None
    if found.dtype == dtype and found.shape[1:] == shape[1:] and found.shape[0] < shape[0]:
        return _grown(path, found, shape)
    if found.shape != shape or found.dtype != dtype:
        raise InputError(
            f"{path}: holds {found.dtype} {found.shape}, expected {np.dtype(dtype)} {shape}; give the "
            "options of the run that made it, or start anew with --fresh"
        )
    return found


def _grown(path: Path, found: np.memmap, shape: tuple[int, ...]) -> np.memmap:
    """The file with room for more rows behind those it has."""
    temporary = path.with_name(path.name + ".part")
    larger = np.lib.format.open_memmap(temporary, mode="w+", dtype=found.dtype, shape=shape)
    for first in range(0, len(found), BATCH_ROWS):
        larger[first : first + BATCH_ROWS] = found[first : first + BATCH_ROWS]
    larger.flush()
    del larger, found  # Windows replaces no file that is mapped
    os.replace(temporary, path)
    return np.lib.format.open_memmap(path, mode="r+")


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """One token per row of logits [B, V] at temperature 1, by uniform [B] in [0, 1)."""
    weights = (logits - logits.amax(1, keepdim=True)).exp_()
    short = -weights.shape[1] % _BLOCK
    blocks = (F.pad(weights, (0, short)) if short else weights).view(len(weights), -1, _BLOCK)
    ends = blocks.sum(2).double().cumsum(1)
    target = uniform.double()[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    before = torch.cat([torch.zeros_like(ends[:, :1]), ends], 1).gather(1, block)
    inner = blocks[torch.arange(len(blocks)), block[:, 0]].double().cumsum(1)
    within = torch.searchsorted(inner, (target - before).clamp_(min=0), right=True)
    # rounding may point behind the last token with any weight
    last = (inner < inner[:, -1:]).sum(1, keepdim=True)
    return (block * _BLOCK + torch.minimum(within, last))[:, 0]


@torch.inference_mode()
def sample_rows(teacher: Llama, rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows from the teacher, BOS first: tokens [rows, context] and its states there [rows, context, D]."""
    s = teacher.shape
    dtype = teacher.layers[0].qkv.dtype
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(s.context, rows, generator=generator, dtype=torch.float64)
    device = teacher.embedding.device
    # float32: torch's attention of one query is twice as fast in it on a CPU
    cache = torch.zeros(s.layers, 2, rows, s.kv_heads, s.context, s.head_width, device=device)
    tokens = torch.full((rows, s.context), s.bos, dtype=torch.long, device=device)
    states = torch.empty(rows, s.context, s.width, dtype=torch.bfloat16, device=device)
    for position in range(s.context):
        state, _ = teacher(tokens[:, position : position + 1], cache, position)
        states[:, position] = state[:, 0].to(torch.bfloat16)
        if position + 1 < s.context:
            logits = F.linear(state[:, 0].to(dtype), teacher.head_matrix).float()
            tokens[:, position + 1] = draw(logits, uniform[position].to(device))
    return tokens, states


def sample_corpus(
    corpus: Corpus, teacher: Llama, seed: int, threads: int, progress: Callable[[int, int], None]
) -> None:
    """Fill the corpus; batch i is drawn from seed + i, so that a resumed corpus equals an unbroken one."""
    context = teacher.shape.context
    if corpus.rows_done < corpus.rows:
        corpus.rows_done -= corpus.rows_done % BATCH_ROWS  # the last batch of one that grows was cut off
    batches = range(corpus.rows_done // BATCH_ROWS, -(-corpus.rows // BATCH_ROWS))
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[tuple[Tensor, Tensor]]] = deque()
        for batch in [*batches, *[None] * threads]:
            if batch is not None:
                waiting.append(pool.submit(sample_rows, teacher, BATCH_ROWS, seed + batch))
            if waiting and (batch is None or len(waiting) > threads):
                corpus.put(*waiting.popleft().result())
                progress(corpus.rows_done * context, corpus.rows * context)


@torch.inference_mode()
def fill_from_text(
    corpus: Corpus, teacher: Llama, tokens: np.ndarray, progress: Callable[[int, int], None]
) -> None:
    """Fill the corpus with a text of tokens [N]: BOS and context - 1 tokens of it in every row."""
    s = teacher.shape
    step = s.context - 1
    dtype = teacher.layers[0].qkv.dtype
    while corpus.rows_done < corpus.rows:
        count = min(BATCH_ROWS, corpus.rows - corpus.rows_done)
        first = corpus.rows_done * step
        rows = np.full((count, s.context), s.bos, np.int32)
        rows[:, 1:] = tokens[first : first + count * step].reshape(count, step)
        batch = torch.from_numpy(rows).long().to(teacher.embedding.device)
        states = torch.cat([teacher(piece)[0].to(dtype) for piece in batch.split(4)])
        corpus.put(batch, states)
        progress(corpus.rows_done * s.context, corpus.rows * s.context)
