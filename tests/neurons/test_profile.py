"""Profiles: shares, merging, thresholds against NumPy, the stored form and what is refused of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf_samples as samples
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfer.errors import FormatError, InputError
from pyinfer.gguf_file import open_gguf
from pyinfer.neurons.profile import Profile
from pyinfer.section import Entry, read_section, update_section

LAYERS, NEURONS, TOKENS = 3, 40, 500


def text(name: str, tokens: int = TOKENS) -> dict[str, object]:
    return {"name": name, "sha256": name * 8, "tokens": tokens, "windows": 2}


def counted(seed: int, name: str = "a") -> Profile:
    random = np.random.default_rng(seed)
    return Profile(random.integers(0, TOKENS + 1, (LAYERS, NEURONS)), TOKENS, [text(name)], None, "relu")


def bins_of(values: np.ndarray) -> np.ndarray:
    """Histogram of one layer, by the definition: 16 bins per octave of a float32, by its bits."""
    bits = np.abs(values.astype(np.float32)).view(np.uint32)
    return np.bincount(bits // 2**19, minlength=4096).astype(np.int64)


def measured(values: np.ndarray, name: str = "a") -> Profile:
    """A profile of one layer whose activations were these, [tokens, neurons]."""
    tokens, neurons = values.shape
    zeros = np.zeros((1, neurons), np.int64)
    return Profile(zeros, tokens, [text(name, tokens)], bins_of(values.ravel())[None], "silu")


def test_share_is_of_the_tokens() -> None:
    profile = counted(1)
    assert profile.share.dtype == np.float64 and profile.share.shape == (LAYERS, NEURONS)
    np.testing.assert_array_equal(profile.share, profile.counts.astype(float) / 500)
    assert not Profile.empty(2, 5, "relu", histogram=False).share.any()


def test_merging_adds() -> None:
    one, other = counted(1, "a"), counted(2, "b")
    both = one.merge(other)
    assert np.array_equal(both.counts, one.counts + other.counts) and both.tokens == 2 * TOKENS
    assert both.corpus == [text("a"), text("b")] and both.histogram is None
    random = np.random.default_rng(0)
    small, large = random.normal(0, 1, (7, 5)), random.normal(0, 9, (3, 5))
    together = measured(small, "a").merge(measured(large, "b"))
    assert np.array_equal(together.histogram, measured(np.concatenate([small, large])).histogram)


def test_what_does_not_belong_together_is_not_merged() -> None:
    profile = counted(1)
    for other, words in (
        (counted(2, "a"), "both profiles have counted a, expected every text in one"),
        (replace(counted(2, "b"), counts=np.zeros((LAYERS, NEURONS + 1), np.int64)), "3 x 41 relu neurons"),
        (replace(counted(2, "b"), activation="fatrelu"), "of 3 x 40 fatrelu neurons"),
        (replace(counted(2, "b"), window_tokens=128), "windows of 128 cannot be added to"),
        (replace(counted(2, "b"), histogram=np.zeros((LAYERS, 4096), np.int64)), "with a histogram"),
    ):
        with pytest.raises(InputError, match=words):
            profile.merge(other)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["normal", "laplace", "uniform", "lognormal"]),
    st.floats(1e-6, 1e6),
    st.floats(0, 0.6),
    st.floats(0, 1),
    st.integers(0, 9),
)
def test_thresholds_are_quantiles(kind: str, scale: float, zeros: float, share: float, seed: int) -> None:
    """Within a bin, a 16th of an octave, of NumPy's; and the share that lies below is the one asked for."""
    random = np.random.default_rng(seed)
    values = getattr(random, kind)(size=(400, 25)).astype(np.float32) * np.float32(scale)
    values[random.random(values.shape) < zeros] = 0
    magnitudes = np.sort(np.abs(values), axis=None).astype(np.float64)
    threshold = measured(values).quantile(0, share)
    exact = np.quantile(magnitudes, share, method="inverted_cdf")
    if exact == 0 or share == 0:
        assert threshold == 0
    else:
        assert exact / (1 + 1 / 16) <= threshold <= exact * (1 + 1 / 16)
        # Between the values next to the threshold's bin there is no more than the bin holds.
        inside = bins_of(np.float32([exact])).argmax()
        slack = bins_of(values.ravel())[inside] / values.size
        assert abs((magnitudes < threshold).mean() - share) <= slack + 1e-12


def test_thresholds_that_cannot_be() -> None:
    profile = measured(np.ones((4, 4)))
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(InputError, match="expected 0 to 1"):
            profile.quantile(0, share)
    with pytest.raises(InputError, match=r"activation relu\) has no histogram"):
        counted(1).quantile(0, 0.5)
    with pytest.raises(InputError, match="has no histogram"):
        Profile.empty(1, 4, "silu", histogram=True).quantile(0, 0.5)
    assert profile.quantile(0, 0) == 0 and 1 <= profile.quantile(0, 1) <= 1 + 1 / 16
    endless = measured(np.full((4, 4), np.inf))
    assert np.isfinite(endless.quantile(0, 0.5))


@pytest.mark.parametrize(
    "profile", [counted(1), measured(np.ones((9, NEURONS))), counted(1).merge(counted(2, "b"))]
)
def test_the_stored_form_is_the_same_profile(tmp_path: Path, profile: Profile) -> None:
    path = samples.write_tiny(tmp_path / "model.gguf")
    update_section(path, profile=profile.to_entry())
    with open_gguf(path) as file:
        entry = read_section(file).entries["profile"]
    found = Profile.from_entry(entry, len(profile.counts), NEURONS)
    assert np.array_equal(found.counts, profile.counts) and found.counts.dtype == np.int64
    assert (found.histogram is None) == (profile.histogram is None)
    assert found.histogram is None or np.array_equal(found.histogram, profile.histogram)
    for name in ("tokens", "corpus", "activation", "window_tokens"):
        assert getattr(found, name) == getattr(profile, name)


def changed(info: dict[str, object] | None = None, **arrays: np.ndarray | None) -> Entry:
    entry = counted(1).to_entry()
    kept = {**entry.arrays, **arrays}
    return Entry(
        {**entry.info, **(info or {})}, {name: each for name, each in kept.items() if each is not None}
    )


def with_count(value: int) -> np.ndarray:
    counts = counted(1).counts.copy()
    counts[1, 7] = value
    return counts


BINS = np.zeros((LAYERS, 4096), np.int64)
BAD = {
    "no counts": (changed(counts=None), "counts is missing, expected integers [3, 40], as the model has"),
    "neurons": (changed(counts=np.zeros((3, 41), np.int64)), "counts is int64 [3, 41]"),
    "layers": (changed(counts=np.zeros((2, 40), np.int64)), "counts is int64 [2, 40]"),
    "NaN": (changed(counts=np.full((3, 40), np.nan)), "counts is float64 [3, 40], expected integers"),
    "bools": (changed(counts=np.ones((3, 40), bool)), "counts is bool"),
    "negative": (changed(counts=with_count(-1)), "counts of layer 1 at 7 is -1, expected 0 to 500"),
    "too many": (changed(counts=with_count(501)), "counts of layer 1 at 7 is 501, expected 0 to 500"),
    "wrapped": (changed(counts=with_count(0).astype("u8") + 2**63), "expected 0 to 500"),
    "no tokens": (changed({"tokens": None}), "says None tokens in windows of 256, expected whole numbers"),
    "negative tokens": (changed({"tokens": -1}), "says -1 tokens"),
    "endless tokens": (changed({"tokens": 1 << 50}), "expected whole numbers"),
    "half a token": (changed({"tokens": 500.0}), "says 500.0 tokens"),
    "window": (changed({"window_tokens": 0}), "windows of 0"),
    "activation": (changed({"activation": 3}), "does not say its activation"),
    "corpus": (changed({"corpus": {}}), "does not say its activation and its corpus"),
    "text": (changed({"corpus": [3]}), "corpus holds 3, expected name, sha256, tokens and windows"),
    "text without hash": (changed({"corpus": [{**text("a"), "sha256": None}]}), "expected name, sha256"),
    "negative windows": (changed({"corpus": [{**text("a"), "windows": -1}]}), "expected name, sha256"),
    "bins": (changed(histogram=BINS[:, 1:]), "histogram is int64 [3, 4095], expected integers [3, 4096]"),
    "negative bin": (changed(histogram=BINS - 1), "histogram of layer 0 at 0 is -1"),
    "bins that do not add up": (
        changed(histogram=BINS),
        "histogram of layer 0 counts 0 activations, expected 20000",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_entries_that_cannot_be(case: str) -> None:
    entry, words = BAD[case]
    with pytest.raises(FormatError) as caught:
        Profile.from_entry(entry, LAYERS, NEURONS)
    assert words in str(caught.value) and "\n" not in str(caught.value)
