"""Rows for predictors: what each feed-forward layer reads on a text, and which of its neurons fired then.

They are kept in files without a name, which vanish with the process, so that memory holds one layer's part at
a time. The end of every text is held out: one part chooses thresholds, another one measures.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pyinfer.errors import FormatError, InputError
from pyinfer.neurons.corpus import WINDOW_TOKENS, Corpus, read_corpus
from pyinfer.runtime.loader import Model
from pyinfer.runtime.session import Session
from pyinfer.text.tokenizer import Tokenizer
from pyinfer_convert.output import check_space

PARTS = ("fit", "choose", "measure")
HELD_OUT = 8  # one window of so many for each of the two parts that are held out
LEAST_WINDOWS = HELD_OUT
CHUNK_BYTES = 32 << 20  # of float32 rows of neurons that are computed at once

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Windows:
    """Windows of token ids, by part."""

    parts: dict[str, list[np.ndarray]]

    @property
    def tokens(self) -> dict[str, int]:
        return {part: sum(map(len, windows)) for part, windows in self.parts.items()}


def read_windows(paths: Sequence[Path], tokenizer: Tokenizer, length: int, most_tokens: int) -> Windows:
    """Windows of all texts, together about `most_tokens`, divided into parts.

    raises InputError for a text that cannot be read or is none, and where there is too little
    """
    length = min(length, WINDOW_TOKENS)
    left, parts = -(-most_tokens // length), {part: [] for part in PARTS}
    seen: dict[str, Corpus] = {}
    for number, path in enumerate(paths):
        corpus = read_corpus(path, tokenizer, length, left // (len(paths) - number))
        if corpus.sha256 in seen:
            continue
        seen[corpus.sha256] = corpus
        left -= len(corpus.windows)
        n_held = len(corpus.windows) // HELD_OUT
        for part, count in (("measure", n_held), ("choose", n_held)):
            parts[part] += corpus.windows[len(corpus.windows) - count :]
            corpus = Corpus(corpus.name, corpus.sha256, corpus.windows[: len(corpus.windows) - count])
        parts["fit"] += corpus.windows
    if not all(parts.values()):
        found = sum(map(len, parts.values()))
        raise InputError(
            f"the texts give {found} windows of {length} tokens, expected at least {LEAST_WINDOWS} of "
            "one of them; give more text or more --tokens"
        )
    return Windows(parts)


class Rows:
    """Inputs and firings of all layers. Close it, or use it as a context manager."""

    def __init__(
        self, n_layers: int, width: int, n_neurons: int, tokens: dict[str, int], folder: Path
    ) -> None:
        self.n_layers, self.n_neurons, self._n_bytes = n_layers, n_neurons, -(-n_neurons // 8)
        self._begin, at = {}, 0
        for part in PARTS:
            self._begin[part] = at
            at += tokens[part]
        self.tokens, self._tokens = tokens, at
        check_space(folder / "rows", n_layers * at * (2 * width + self._n_bytes))
        self._files = []
        self._x = [self._map(np.float16, width, folder) for _ in range(n_layers)]
        self._fired = [self._map(np.uint8, self._n_bytes, folder) for _ in range(n_layers)]

    def _map(self, dtype: type, width: int, folder: Path) -> np.ndarray:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed by close()
        self._files.append(file)
        return np.memmap(file, dtype, "w+", shape=(self._tokens, width))

    def put(self, layer: int, at: int, x: np.ndarray, hidden: np.ndarray) -> None:
        """Rows of a layer from row `at` on: its input, and what its neurons gave (not 0: it fired)."""
        if not (np.isfinite(x).all() and np.isfinite(hidden).all()):
            raise FormatError(f"layer {layer} computes numbers that are not finite; the model is damaged")
        rows = slice(at, at + len(x))
        self._x[layer][rows] = np.clip(x, -65504, 65504)
        self._fired[layer][rows] = np.packbits(hidden != 0, axis=1)

    def begin(self, part: str) -> int:
        return self._begin[part]

    def chunks(
        self, layer: int, part: str, most_tokens: int | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """x float32 [n, D] and fired bool [n, F] of a part, some rows at a time."""
        begin = self._begin[part]
        end = begin + min(self.tokens[part], most_tokens or self._tokens)
        step = max(64, CHUNK_BYTES // (4 * self.n_neurons))
        for first in range(begin, end, step):
            rows = slice(first, min(first + step, end))
            bits = np.unpackbits(self._fired[layer][rows], axis=1, count=self.n_neurons)
            yield self._x[layer][rows].astype(np.float32), bits.view(bool)

    def close(self) -> None:
        self._x, self._fired = [], []
        for file in self._files:
            file.close()

    def __enter__(self) -> Rows:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def collect(
    model: Model, windows: Windows, folder: Path, threads: int | None, progress: Progress | None = None
) -> Rows:
    """Run the model (loaded with observe="rows") over all windows; progress(done, total) in tokens.

    folder : where the rows lie until they are closed; raises CapacityError where they do not fit
    """
    n_layers, width = model.hparams.block_count, model.hparams.embedding_length
    longest = max(len(window) for part in windows.parts.values() for window in part)
    session = Session(model, longest, threads)
    rows = Rows(n_layers, width, model.hparams.feed_forward_length, windows.tokens, folder)
    done, total = 0, sum(windows.tokens.values())
    try:
        for part in PARTS:
            for window in windows.parts[part]:
                session.truncate(0)
                for first in range(0, len(window), session.chunk_rows):
                    piece = window[first : first + session.chunk_rows]
                    session.prefill(piece)
                    for layer in range(n_layers):
                        x, hidden = session.observed("x", layer), session.observed("hidden", layer)
                        rows.put(layer, done, x, hidden)
                    done += len(piece)
                    if progress is not None:
                        progress(done, total)
        return rows
    except BaseException:
        rows.close()
        raise
    finally:
        session.close()
