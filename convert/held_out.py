"""What skipping activations costs a model, measured on text that its profile has not counted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path

import numpy as np

from pyinfer.errors import FormatError
from pyinfer.progress import Progress
from pyinfer_convert.terminal import Signals, note

SHARES = (0.25, 0.4, 0.5)  # of the activations
MOST_WINDOWS = 20  # some thousand tokens for each share


def choose_windows(texts: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """At most MOST_WINDOWS that can be scored, from all texts in turn. texts : windows of each text"""
    from pyinfer.runtime.loss import LEAST_TOKENS

    usable = [[window for window in text if len(window) >= LEAST_TOKENS] for text in texts]
    turns = (window for turn in zip_longest(*usable) for window in turn if window is not None)
    return [window for window, _ in zip(turns, range(MOST_WINDOWS))]


def measure_loss(path: Path, windows: Sequence[np.ndarray], threads: int | None, signals: Signals) -> None:
    """Measure what SHARES cost and write that into the section of a model that has a profile.

    Where that cannot be, a note says why. raises KeyboardInterrupt, with nothing written
    """
    from pyinfer.neurons.cats import to_entry
    from pyinfer.runtime.loss import measure
    from pyinfer.section import update_section

    if not windows:
        note(
            "note: what --sparsity cats=SHARE costs was not measured, as all of the text is counted; "
            "a longer text, or --fresh with fewer --tokens, leaves some to measure on"
        )
        return
    scored = sum(map(len, windows))
    with Progress(sys.stderr, "measuring what skipping costs", "tokens") as bar, signals.held():

        def progress(done: int, total: int) -> None:
            every = scored * (1 + len(SHARES))
            bar(every * done // total, every)

        perplexities = measure(path, windows, SHARES, threads, signals.checked(progress))
    try:
        entry = to_entry(perplexities)
    except FormatError as error:
        note(f"note: what --sparsity cats=SHARE costs is not stored: {error}")
        return
    update_section(path, thresholds=entry)
    note(describe_loss(perplexities, scored))


def describe_loss(perplexities: dict[float, float], tokens: int) -> str:
    """One line for people. perplexities : by share, 0 among them"""
    dense = perplexities[0.0]
    costs = [
        f"cats={share:g} {perplexities[share] / dense - 1:+.1%}" for share in sorted(perplexities) if share
    ]
    return (
        f"loss: perplexity {dense:.4g} on {tokens} tokens that were not counted, with --sparsity "
        f"{', '.join(costs)}"
    )
