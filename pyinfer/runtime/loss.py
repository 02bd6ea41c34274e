"""What skipping activations costs: the perplexity of a text at several shares, for the section's thresholds.

Of every window the second half is scored, as llama.cpp does it, so that each scored token has context.
Long steps follow no predictor: a model with predictors is scored in short ones, as it generates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np

from pyinfer.cpu.lowering import MOST_BY_ROWS
from pyinfer.errors import InputError
from pyinfer.neurons.sparsity import CATS
from pyinfer.program.sparsity import DENSE, PREDICTED
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session

LEAST_TOKENS = 4  # of a window with a half to score
_SCORED_ROWS = 64  # whose logits are in memory at once
_MOST_NLL = 700.0  # exp of more is no float

Progress = Callable[[int, int], None]


def measure(
    path: str | Path,
    windows: Sequence[np.ndarray],
    shares: Iterable[float],
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> dict[float, float]:
    """Perplexity by share of skipped activations; share 0, the dense model, is always among them.

    path : a model whose section has a profile with a histogram
    windows : int [n], sequences of their own, as `read_corpus` cuts them
    progress : (windows done, windows to do) over all shares
    Raises InputError for windows without text to score, and as `load_model` does.
    """
    usable = [window for window in windows if len(window) >= LEAST_TOKENS]
    if not usable:
        raise InputError(f"no window of the text has {LEAST_TOKENS} tokens, expected some text to score")
    wanted = sorted({0.0, *shares})
    found = {}
    for number, share in enumerate(wanted):

        def follow(done: int, before: int = number * len(usable)) -> None:
            if progress is not None:
                progress(before + done, len(wanted) * len(usable))

        with load_model(path, sparsity=f"{CATS}={share}" if share else DENSE) as model:
            session = Session(model, max(map(len, usable)), n_threads)
            try:
                found[share] = perplexity(session, usable, follow)
            finally:
                session.close()
    return found


def perplexity(
    session: Session, windows: Sequence[np.ndarray], progress: Callable[[int], None] = lambda done: None
) -> float:
    """exp of the mean negative log-likelihood of the second halves; progress(windows done).

    The first halves run in long steps, without predictors, as prompts do.
    """
    nll, tokens = 0.0, 0
    most = min(_SCORED_ROWS, MOST_BY_ROWS) if PREDICTED in session.model.plan.modes else _SCORED_ROWS
    for done, window in enumerate(windows, 1):
        half, last = len(window) // 2, len(window) - 1
        session.truncate(0)
        session.prefill(window[:half])
        for start in range(half, last, most):
            stop = min(start + most, last)
            logits = session.prefill(window[start:stop], all_logits=True).astype(np.float64)
            logits -= logits.max(1, keepdims=True)
            picked = logits[np.arange(stop - start), window[start + 1 : stop + 1]]
            nll += float((np.log(np.exp(logits).sum(1)) - picked).sum())
        tokens += last - half
        progress(done)
    return math.exp(min(nll / tokens, _MOST_NLL))
