"""How often each neuron of a model fires on a text: the machine-independent truth behind every placement.

Source: PowerInfer (arXiv 2312.12456), section 6.1: per layer, a table that counts activations of neurons. For
models whose activation is never zero, what CATS (arXiv 2404.08763) needs: how large |act(gate)| is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from pyinfer.errors import FormatError, InputError
from pyinfer.neurons.corpus import WINDOW_TOKENS
from pyinfer.program.sparsity import HISTOGRAM_BINS, HISTOGRAM_SHIFT
from pyinfer.section import Entry

_LARGEST = np.uint32(0x7F7FFFFF)  # bits of the largest float32; what lies behind is no number


@dataclass(frozen=True, eq=False)
class Profile:
    """Counts over `tokens` tokens.

    counts : int64 [L, F], for how many tokens each neuron was not zero; all 0 where there is a histogram
    corpus : what was counted: {name, sha256, tokens, windows} for each text, the windows from its start on
    histogram : int64 [L, 4096] of |act(gate)| of all neurons together, by the upper 12 bits below the sign of
        a float32; None for activations that are exactly zero for most neurons
    activation : relu, silu ...;  window_tokens : of the sequences that were counted
    """

    counts: np.ndarray
    tokens: int
    corpus: list[dict[str, Any]]
    histogram: np.ndarray | None
    activation: str
    window_tokens: int = WINDOW_TOKENS

    @classmethod
    def empty(cls, n_layers: int, n_neurons: int, activation: str, *, histogram: bool) -> Profile:
        """Nothing counted yet."""
        bins = np.zeros((n_layers, HISTOGRAM_BINS), np.int64) if histogram else None
        return cls(np.zeros((n_layers, n_neurons), np.int64), 0, [], bins, activation)

    @property
    def share(self) -> np.ndarray:
        """float64 [L, F]: the share of tokens for which each neuron fired."""
        return self.counts / max(1, self.tokens)

    def merge(self, other: Profile) -> Profile:
        """Both together. Raises InputError where they are not of the same model, or share a text."""
        mine, theirs = self._identity(), other._identity()
        if mine != theirs:
            raise InputError(f"a profile of {theirs} cannot be added to one of {mine}")
        twice = {each["sha256"] for each in self.corpus} & {each["sha256"] for each in other.corpus}
        if twice:
            name = next(each["name"] for each in other.corpus if each["sha256"] in twice)
            raise InputError(f"both profiles have counted {name}, expected every text in one of them only")
        bins = None if self.histogram is None else self.histogram + other.histogram
        counts, corpus = self.counts + other.counts, [*self.corpus, *other.corpus]
        return Profile(counts, self.tokens + other.tokens, corpus, bins, self.activation, self.window_tokens)

    def _identity(self) -> str:
        layers, neurons = self.counts.shape
        kind = "counts" if self.histogram is None else "a histogram"
        return f"{layers} x {neurons} {self.activation} neurons with {kind}, windows of {self.window_tokens}"

    def quantile(self, layer: int, share: float) -> float:
        """The threshold on |act(gate)| below which this share of a layer's activations lies.

        Within a bin, a 16th of an octave, values are taken as spread evenly. Raises InputError without a
        histogram, or for a share outside 0 to 1.
        """
        if self.histogram is None or not self.histogram[layer].any():
            raise InputError(
                f"the profile (activation {self.activation}) has no histogram of magnitudes; "
                "only activations that are hardly ever zero have one"
            )
        if not 0 <= share <= 1:  # nor NaN
            raise InputError(f"the share of activations to skip is {share}, expected 0 to 1")
        below = np.concatenate([[0], np.cumsum(self.histogram[layer])])
        wanted = share * float(below[-1])
        bin_ = int(np.searchsorted(below[1:], wanted))
        if not bin_ or not wanted:  # zeros and what is hardly more
            return 0.0
        edges = np.array([bin_, bin_ + 1], np.uint32) << np.uint32(HISTOGRAM_SHIFT)
        low, high = np.minimum(edges, _LARGEST).view(np.float32).astype(np.float64)
        inside = below[bin_ + 1] - below[bin_]
        return float(low + (high - low) * (wanted - below[bin_]) / inside)

    def to_entry(self) -> Entry:
        """For the section "profile"; `from_entry` reads it again."""
        arrays = {"counts": self.counts}
        if self.histogram is not None:
            arrays["histogram"] = self.histogram
        info = {"tokens": self.tokens, "activation": self.activation, "window_tokens": self.window_tokens}
        return Entry({**info, "corpus": self.corpus}, arrays)

    @classmethod
    def from_entry(cls, entry: Entry, n_layers: int, n_neurons: int) -> Profile:
        """raises FormatError for another shape, numbers that cannot be counts, and missing values"""
        tokens, activation = entry.info.get("tokens"), entry.info.get("activation")
        window, corpus = entry.info.get("window_tokens"), entry.info.get("corpus")
        if type(tokens) is not int or not 0 <= tokens < 1 << 40 or type(window) is not int or window < 1:
            raise FormatError(
                f"the profile says {tokens!r:.40} tokens in windows of {window!r:.40}, expected whole numbers"
            )
        if not isinstance(activation, str) or not isinstance(corpus, list):
            raise FormatError(
                "the profile does not say its activation and its corpus, expected a text and a list"
            )
        for each in corpus:
            _check_text(each)
        counts = _counts(entry, "counts", (n_layers, n_neurons), tokens)
        bins = None
        if "histogram" in entry.arrays:
            bins = _counts(entry, "histogram", (n_layers, HISTOGRAM_BINS), tokens * n_neurons)
            wrong = np.flatnonzero(bins.sum(1) != tokens * n_neurons)
            if len(wrong):
                raise FormatError(
                    f"the profile's histogram of layer {wrong[0]} counts {bins[wrong[0]].sum()} activations, "
                    f"expected {tokens * n_neurons}, those of {n_neurons} neurons for {tokens} tokens"
                )
        return cls(counts, tokens, corpus, bins, activation, window)


def _check_text(each: object) -> None:
    texts = isinstance(each, dict) and all(isinstance(each.get(key), str) for key in ("name", "sha256"))
    if not texts or any(type(each.get(key)) is not int or each[key] < 0 for key in ("tokens", "windows")):
        raise FormatError(
            f"the profile's corpus holds {each!r:.80}, expected name, sha256, tokens and windows of a text"
        )


def _counts(entry: Entry, name: str, shape: tuple[int, int], most: int) -> np.ndarray:
    found = entry.arrays.get(name)
    if found is None or found.shape != shape or found.dtype.kind not in "iu":
        what = "missing" if found is None else f"{found.dtype} {list(found.shape)}"
        raise FormatError(
            f"the profile's {name} is {what}, expected integers {list(shape)}, as the model has"
        )
    wrong = np.argwhere((found < 0) | (found > most))
    if len(wrong):
        layer, place = (int(index) for index in wrong[0])
        raise FormatError(
            f"the profile's {name} of layer {layer} at {place} is {found[layer, place]}, expected 0 to {most}"
        )
    return found.astype(np.int64, copy=False)
