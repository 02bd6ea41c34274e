"""What thresholding costs a model that leaves no neuron at zero, as it was measured on text of its profile.

Source: CATS (arXiv 2404.08763): a share of the activations, the smallest of each layer, counts as zero. The
thresholds follow from the profile's histogram; the entry "thresholds" of the section holds what came of them:
info {"perplexity": {"0": p0, "0.25": p1, ...}}, by the share that was skipped.
"""

from __future__ import annotations

import math

from pyinfer.errors import FormatError
from pyinfer.section import Entry, Section

ENTRY = "thresholds"
_MOST_PERPLEXITY = 1e30


def to_entry(perplexities: dict[float, float]) -> Entry:
    """For the section "thresholds": the perplexity at each share of skipped activations, 0 among them.

    Raises FormatError for perplexities that cannot be, which `from_entry` would not read.
    """
    found = {f"{share:g}": float(perplexities[share]) for share in sorted(perplexities)}
    entry = Entry({"perplexity": found})
    from_entry(entry)
    return entry


def from_entry(entry: Entry) -> dict[float, float]:
    """The perplexity by share, ascending. Raises FormatError for what `to_entry` does not write."""
    stored = entry.info.get("perplexity")
    if not isinstance(stored, dict):
        raise FormatError(f"the thresholds hold {stored!r:.40}, expected the perplexity by share")
    found = {}
    for key, value in stored.items():
        try:
            share = float(key)
        except ValueError:
            share = math.nan
        if not 0 <= share < 1 or type(value) not in (int, float) or not 1 <= value <= _MOST_PERPLEXITY:
            raise FormatError(
                f"the thresholds hold perplexity {value!r:.40} for share {key!r:.40}, "
                "expected at least 1 for a share from 0 to below 1"
            )
        found[share] = float(value)
    if 0 not in found:
        raise FormatError("the thresholds hold no perplexity for share 0, expected it to compare with")
    return dict(sorted(found.items()))


def expected_loss(stored: Section | Entry | None, share: float) -> float | None:
    """How much higher perplexity is with this share of activations skipped: 0.02 is 2 %.

    Between measured shares along a straight line; None where nothing was measured, or not so large a share.
    Raises FormatError as `from_entry` does.
    """
    entry = stored.entries.get(ENTRY) if isinstance(stored, Section) else stored
    if entry is None:
        return None
    perplexities = from_entry(entry)
    shares = list(perplexities)
    above = next((each for each in shares if each >= share), None)
    if above is None:
        return None
    below = max(each for each in shares if each <= share)
    part = (share - below) / (above - below) if above > below else 0.0
    mixed = perplexities[below] + part * (perplexities[above] - perplexities[below])
    return mixed / perplexities[0.0] - 1
