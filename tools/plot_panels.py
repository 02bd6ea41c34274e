"""The pictures of `pyinfer_tools.plot_neurons`: activations, hot and cold neurons, predictors.

Every function draws into a figure, or a part of one, that matplotlib made. Colours are those of Okabe and
Ito, which people with any colour vision tell apart.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from pyinfer.neurons.budget import PURPOSES, ModelBytes
from pyinfer.neurons.placement import ON_GPU, Placement
from pyinfer.neurons.predictor import Predictors
from pyinfer.neurons.profile import Profile
from pyinfer.program.sparsity import HISTOGRAM_SHIFT
from pyinfer.progress import format_amount

MARKED_SHARE = 0.8  # of all activations, the point of figure 5 in the paper
MARKED_SMALL = 0.5  # of all magnitudes, where activations are never zero
STYLE = {
    "axes.axisbelow": True,
    "axes.edgecolor": "#6b7280",
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "figure.titlesize": 12,
    "figure.titleweight": "bold",
    "font.size": 10,
    "grid.color": "#e5e7eb",
    "legend.edgecolor": "none",
    "legend.framealpha": 1,
    "savefig.dpi": 150,
    "text.parse_math": False,  # a file's name may hold dollars
}

_BLUE, _ORANGE, _GREEN, _SKY, _YELLOW, _PINK = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#56b4e9",
    "#e69f00",
    "#cc79a7",
)
_GRAY, _LIGHT = "#6b7280", "#c9cdd3"
_OF_PURPOSE = dict(zip(PURPOSES, (_GRAY, _BLUE, _SKY, _GREEN, _PINK, _ORANGE)))
_POINTS = 1000  # of a curve: more are no longer seen
_BANDS = 400  # of the map, likewise
_LEAST_SHARE = 1e-4  # of tokens; what fires less often looks like what never fires
_MOST_LETTERS = 48
_LARGEST = np.uint32(0x7F7FFFFF)  # bits of the largest float32


def cumulative(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The curve of figure 5 (arXiv 2312.12456): the most frequent neurons, and the activations they cause.

    counts : integers of any shape, how often each neuron fired, some of them above 0
    returns two float64 arrays, both rising from 0 to 100 (%), of at most 1001 points
    """
    sums = np.concatenate([[0], np.cumsum(np.sort(counts, axis=None)[::-1])])
    at = np.unique(np.linspace(0, counts.size, min(counts.size, _POINTS) + 1).astype(int))
    return 100 * at / counts.size, 100 * sums[at] / sums[-1]


def causing(counts: np.ndarray, share: float) -> float:
    """The smallest part of the neurons that together cause this share of all activations, 0 to 1."""
    sums = np.cumsum(np.sort(counts, axis=None)[::-1])
    return (int(np.searchsorted(sums, share * sums[-1])) + 1) / counts.size


def magnitudes(histogram: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values of |act(gate)|, and how many of all activations are smaller (%), at the upper edges of all bins.

    histogram : int64 [4096] of a profile, some of it above 0
    """
    upper = np.arange(1, len(histogram) + 1, dtype=np.uint32) << np.uint32(HISTOGRAM_SHIFT)
    values = np.minimum(upper, _LARGEST).view(np.float32).astype(np.float64)
    return values, 100 * np.cumsum(histogram) / histogram.sum()


def draw_activations(figure: Any, profile: Profile, layer: int, name: str) -> None:
    """One layer on the left, all layers on the right; of what fires, or else of how large activations are."""
    one, whole = figure.subplots(1, 2, sharey=True)
    fired = f" ({_percent(profile.share[layer].mean())} fire for a token)"
    fired_in_all = f" ({_percent(profile.share.mean())} fire for a token)"
    if profile.histogram is None:
        headline = "How unevenly neurons fire"
        _draw_firing(one, profile.counts, profile.counts[layer])
        _draw_firing(whole, None, profile.counts)
    else:
        headline, fired, fired_in_all = "How large activations are", "", ""
        together = replace(profile, histogram=profile.histogram.sum(0, keepdims=True))
        for axes in (one, whole):
            axes.set(xscale="log", xlim=_limits(together))
        _draw_magnitudes(one, profile, layer, others=True)
        _draw_magnitudes(whole, together, 0, others=False)
    one.set_title(f"Layer {layer}{fired}")
    whole.set_title(f"All {len(profile.counts)} layers{fired_in_all}")
    one.set_ylim(0, 101)
    _title(figure, headline, f"{name}, {printable(profile.activation)}, {profile.tokens:,} tokens")


def _draw_firing(axes: Any, layers: np.ndarray | None, counts: np.ndarray) -> None:
    """One curve, in front of those of all layers."""
    for each in [] if layers is None else layers:
        if each.any():
            _draw_other(axes, cumulative(each))
    axes.plot([0, 100], [0, 100], color=_GRAY, linewidth=1, linestyle=":", label="if all fired alike")
    axes.set(xlim=(0, 100), xlabel="neurons, the most frequent first (%)")
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("share of all activations (%)")
    if not counts.any():
        _say(axes, "no neuron fired")
        return
    axes.legend(loc="lower right", fontsize=9, borderaxespad=0.3)
    axes.plot(*cumulative(counts), color=_BLUE, linewidth=2)
    part = causing(counts, MARKED_SHARE)
    text = f"{_percent(part)} of the neurons\ncause {_percent(MARKED_SHARE)} of the activations"
    _mark(axes, (100 * part, 100 * MARKED_SHARE), text, (0.97, 0.26))


def _draw_magnitudes(axes: Any, profile: Profile, layer: int, others: bool) -> None:
    """As `_draw_firing`. others : whether to draw the other layers behind it"""
    bins = np.asarray(profile.histogram)
    for each in bins if others else ():
        _draw_other(axes, magnitudes(each))
    if others:
        axes.legend(loc="upper left", fontsize=9)
    axes.plot(*magnitudes(bins[layer]), color=_BLUE, linewidth=2)
    axes.set_xlabel(f"|{printable(profile.activation)}(gate)|")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    if axes.get_subplotspec().is_first_col():
        axes.set_ylabel("activations that are smaller (%)")
    middle = profile.quantile(layer, MARKED_SMALL)
    if middle > 0:
        text = f"{_percent(MARKED_SMALL)} are smaller\nthan {middle:.2g}"
        _mark(axes, (middle, 100 * MARKED_SMALL), text, (0.97, 0.26))
    else:
        _say(axes, f"at least {_percent(MARKED_SMALL)} are 0")


def _limits(profile: Profile) -> tuple[float, float]:
    """Between which magnitudes nearly all of the first layer's lie: at least a power of ten, at most six."""
    values, smaller = magnitudes(np.asarray(profile.histogram)[0])
    largest = float(values[np.searchsorted(smaller, 99.99)])
    return min(max(profile.quantile(0, 0.01), largest * 1e-6), largest / 10), largest


def _draw_other(axes: Any, curve: tuple[np.ndarray, np.ndarray]) -> None:
    """The curve of another layer, which the legend names once."""
    label = None if axes.lines else "other layers"
    axes.plot(*curve, color=_LIGHT, linewidth=0.7, label=label)


def _mark(axes: Any, point: tuple[float, float], text: str, where: tuple[float, float]) -> None:
    """A point with lines to both axes. where : the right end of its text, as parts of the axes"""
    low = axes.get_xlim()[0]
    axes.plot([low, point[0], point[0]], [point[1], point[1], 0], color=_ORANGE, linewidth=1, linestyle="--")
    axes.plot(*point, "o", color=_ORANGE, markersize=7)
    text = axes.text(
        *where, text, transform=axes.transAxes, ha="right", va="center", color=_ORANGE, weight="bold"
    )
    text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})  # over the lines


def _say(axes: Any, text: str) -> None:
    axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", color=_GRAY)


def draw_placement(figure: Any, placement: Placement, profile: Profile, sizes: ModelBytes, name: str) -> None:
    """The map of all neurons, what the hot ones of each layer cause and need, and the GPU's memory."""
    heights = (4.5, 1, 1, 0.35) if placement.budget_bytes else (4.5, 1, 1)
    grid = figure.add_gridspec(len(heights), 3, height_ratios=heights, width_ratios=(40, 1, 1))
    above, hot_bar, cold_bar = (figure.add_subplot(grid[0, column]) for column in range(3))
    middle, below = (figure.add_subplot(grid[row, 0], sharex=above) for row in (1, 2))
    _draw_map(above, (hot_bar, cold_bar), placement, profile)
    layers = np.arange(len(placement.hot))
    fired = np.where(placement.hot, profile.counts, 0).sum(1)
    middle.bar(layers, 100 * fired / np.maximum(profile.counts.sum(1), 1), color=_ORANGE, width=0.8)
    middle.set(ylim=(0, 100), yticks=(0, 50, 100), ylabel="%")
    middle.set_title("Activations that hot neurons cause")
    unit, per = _unit(int(max(placement.hot_neurons * sizes.neuron)))
    below.bar(layers, placement.hot_neurons * sizes.neuron / per, color=_ORANGE, width=0.8)
    below.set(xlabel="layer", ylabel=unit)
    in_all = sum(int(hot) * each for hot, each in zip(placement.hot_neurons, sizes.neuron))
    below.set_title(f"Size of hot neurons, {format_amount(in_all, 'bytes')} in all")
    below.xaxis.get_major_locator().set_params(integer=True)
    for axes in (middle, below):
        axes.grid(visible=False, axis="x")
    above.tick_params(labelbottom=False)
    middle.tick_params(labelbottom=False)
    if placement.budget_bytes:
        _draw_budget(figure.add_subplot(grid[3, 0]), placement)
    where = "the CPU always computes hot neurons"
    if placement.processor == ON_GPU:
        budget = format_amount(placement.budget_bytes, "bytes")
        where = f"for {budget} of GPU memory, {placement.n_ctx:,} tokens of context"
    share = fired.sum() / max(profile.counts.sum(), 1)
    hot = f"{_percent(placement.hot.mean())} of the neurons are hot"
    _title(figure, f"{hot} and cause {_percent(share)} of the activations", f"{name}, {where}")


def _draw_map(axes: Any, bars: tuple[Any, Any], placement: Placement, profile: Profile) -> None:
    """bars : where the colours of hot and of cold neurons are explained"""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, LogNorm

    n_layers, n_neurons = placement.hot.shape
    order = np.argsort(-profile.counts, axis=1, kind="stable")
    edges = np.unique(np.linspace(0, n_neurons, min(_BANDS, n_neurons) + 1).astype(int))

    def banded(values: np.ndarray) -> np.ndarray:
        ordered = np.take_along_axis(values, order, 1).astype(np.float64)
        return (np.add.reduceat(ordered, edges[:-1], axis=1) / np.diff(edges)).T

    share = np.maximum(banded(profile.share), _LEAST_SHARE)
    decades = max(1, math.ceil(-math.log10(share.min())))
    norm = LogNorm(10.0**-decades, 1)
    maps = [ListedColormap(colormaps[each](np.linspace(0.08, 0.95, 256))) for each in ("Blues", "Oranges")]
    hot = banded(placement.hot)[..., None]
    axes.imshow(
        (1 - hot) * maps[0](norm(share)) + hot * maps[1](norm(share)),
        aspect="auto",
        origin="lower",
        interpolation="nearest",
        extent=(-0.5, n_layers - 0.5, 0, 100),
    )
    axes.set(ylabel="neurons of a layer,\nthe most frequent first (%)")
    axes.grid(visible=False)
    ticks = [10.0**-each for each in range(decades + 1)]
    for bar, colors, label in zip(bars, maps[::-1], ("hot", "cold")):
        drawn = axes.figure.colorbar(ScalarMappable(norm, colors), cax=bar)
        drawn.outline.set_visible(False)
        drawn.minorticks_off()
        drawn.set_ticks(ticks, labels=[f"{100 * each:g}" for each in ticks] if label == "cold" else ())
        bar.tick_params(length=0)
        bar.set_title(label, loc="right" if label == "hot" else "left", fontsize=10)
    bars[1].set_ylabel("fires for so many of the tokens (%)")


def _draw_budget(axes: Any, placement: Placement) -> None:
    unit, per = _unit(placement.budget_bytes)
    start = 0.0
    free = max(0, placement.budget_bytes - sum(placement.n_bytes.values()))
    parts = [(name, placement.n_bytes.get(name, 0), _OF_PURPOSE[name]) for name in PURPOSES]
    for name, n_bytes, color in [*parts, ("free", free, "#f3f4f6")]:
        if n_bytes:
            label = f"{name.replace('_', ' ')} {format_amount(n_bytes, 'bytes')}"
            axes.barh(0, n_bytes / per, left=start, color=color, label=label, edgecolor="white")
            start += n_bytes / per
    axes.set(yticks=(), xlim=(0, start), xlabel=unit)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.set_title(f"GPU memory, {format_amount(placement.budget_bytes, 'bytes')}")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -1.6), ncols=4, fontsize=9)


def _unit(n_bytes: int) -> tuple[str, int]:
    """The unit for amounts up to this one, and its bytes."""
    power = min(3, max(0, n_bytes.bit_length() - 1) // 10)
    return ("bytes", "KiB", "MiB", "GiB")[power], 1 << 10 * power


def draw_predictors(figure: Any, predictors: Predictors, sizes: ModelBytes, name: str) -> None:
    """Recall, precision, what is predicted for what fires, and rank, of each layer."""
    grid = figure.subplots(2, 2, sharex=True)
    (recall, precision), (shares, rank) = grid
    layers = np.arange(len(predictors.layers))
    of = {
        key: np.array([getattr(each, key) for each in predictors.layers])
        for key in ("recall", "precision", "predicted", "fired", "rank")
    }
    lowest = 100 * of["recall"].min()
    recall.plot(layers, 100 * of["recall"], "o-", color=_BLUE, markersize=4, clip_on=False)
    recall.set_ylim(next(each for each in (99, 98, 95, 90, 80, 50, -0.1) if each < lowest), 100)
    recall.set_title(f"Recall, mean {_percent(of['recall'].mean())}")
    precision.bar(layers, 100 * of["precision"], color=_BLUE)
    precision.set_ylim(0, 100)
    precision.set_title(f"Precision, mean {_percent(of['precision'].mean())}")
    shares.bar(layers, 100 * of["predicted"], color=_SKY, label="predicted")
    shares.bar(layers, 100 * of["fired"], color=_BLUE, width=0.45, label="fired")
    shares.set_title("Neurons for a token")
    beside = {"loc": "lower right", "bbox_to_anchor": (1, 1), "borderaxespad": 0.1}
    shares.legend(ncols=2, fontsize=9, **beside)
    rank.bar(layers, of["rank"], color=_BLUE)
    n_bytes, of_all = sum(sizes.predictor), sum(sizes.neuron) * sizes.n_neurons
    part = _percent(n_bytes / max(1, of_all))
    rank.set_title(f"Rank ({format_amount(n_bytes, 'bytes')}, {part} of the neurons' bytes)")
    for axes in grid.flat:
        axes.grid(visible=False, axis="x")
        axes.xaxis.get_major_locator().set_params(integer=True)
    for axes in (recall, precision, shares):
        axes.set_ylabel("%")
    for axes in (shares, rank):
        axes.set_xlabel("layer")
    figure.align_ylabels()
    predicted, fired = (_percent(of[key].mean()) for key in ("predicted", "fired"))
    tokens = min(each.tokens for each in predictors.layers)
    said = f"Predictors ask for {predicted} of the neurons, {fired} fire"
    forms = " or ".join(sorted({each.form for each in predictors.layers}))
    _title(
        figure,
        said,
        f"{name}, {forms} predictors, measured on {tokens:,} tokens that they were not fitted to",
    )


def _title(figure: Any, headline: str, detail: str) -> None:
    """Two lines above a picture, the first one bold."""
    title = figure.suptitle(f"{headline}\n ", x=0.01, ha="left")
    below = figure.axes[0].annotate(detail, (0, 0.2), xycoords=title, color=_GRAY, annotation_clip=False)
    below.set_in_layout(False)  # the title keeps the room


def _percent(share: float) -> str:
    """For people: 0.0123 -> "1.2 %", 0.423 -> "42 %", 0.9934 -> "99.3 %"."""
    return f"{100 * share:.{0 if 0.0995 <= share < 0.99 or share in (0, 1) else 1}f} %"


def printable(text: str) -> str:
    """A name, or a word of a stranger's file: short, on one line."""
    shown = "".join(each if each.isprintable() else "?" for each in text[:_MOST_LETTERS])
    return shown if len(text) <= _MOST_LETTERS else f"{shown}..."
