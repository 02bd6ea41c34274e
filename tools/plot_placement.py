"""Draw the placement of a model: how many neurons of each layer are hot, and what they cover.

pip install 'pyinfer[plot]'
python -m pyinfer_tools.plot_placement story.gguf -o placement.png
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import numpy as np

from pyinfer.errors import InputError, MissingExtraError, PyInferError
from pyinfer.gguf_file import open_gguf
from pyinfer.models import build_program
from pyinfer.neurons.placement import ON_GPU, Placement
from pyinfer.neurons.profile import Profile
from pyinfer.progress import format_amount
from pyinfer.section import read_section

_ROWS = 400  # of the map: more are no longer seen
_LEAST_SHARE = 1e-4
_HOT, _ACTIVITY, _GRAY = "#c2410c", "#1d4ed8", "#6b7280"


def placement_figure(placement: Placement, share: np.ndarray, title: str) -> Any:
    """A matplotlib figure: above, neurons of each layer in order of how often they fire, with the limit of
    the hot ones; below, the part of all activations that the hot ones cover.

    share : float64 [L, F], for each neuron the part of the tokens for which it fired
    raises MissingExtraError without matplotlib
    """
    pyplot, log_norm = _matplotlib()
    n_layers, n_neurons = share.shape
    falling = -np.sort(-share, axis=1)
    rows = np.linspace(0, n_neurons - 1, min(_ROWS, n_neurons)).astype(int)
    figure, (above, below) = pyplot.subplots(
        2, 1, figsize=(9, 6), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    drawn = above.imshow(
        np.maximum(falling[:, rows], _LEAST_SHARE).T,
        norm=log_norm(_LEAST_SHARE, 1),
        cmap="Blues",
        aspect="auto",
        origin="lower",
        extent=(-0.5, n_layers - 0.5, 0, 100),
    )
    hot = 100 * placement.hot.mean(1)
    edges = np.arange(n_layers + 1) - 0.5
    above.stairs(
        hot, edges, color=_HOT, linewidth=2, label=f"hot: {100 * placement.hot.mean():.1f} % of neurons"
    )
    above.set_ylabel("neurons, most frequent first (%)")
    above.legend(loc="upper right")
    above.set_title(title)
    figure.colorbar(drawn, ax=above, label="fires for this part of the tokens")
    total = np.maximum(share.sum(1), np.finfo(float).tiny)
    covered = 100 * np.where(placement.hot, share, 0).sum(1) / total
    below.bar(np.arange(n_layers), covered, color=_ACTIVITY, width=0.9)
    mean = 100 * np.where(placement.hot, share, 0).sum() / max(share.sum(), np.finfo(float).tiny)
    below.axhline(mean, color=_GRAY, linewidth=1)
    below.annotate(f"{mean:.1f} % in all", (n_layers - 0.5, 118), ha="right", va="center", color=_GRAY)
    below.set(ylim=(0, 130), yticks=(0, 50, 100), ylabel="activations\ncovered (%)", xlabel="layer")
    below.xaxis.get_major_locator().set_params(integer=True)
    return figure


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib

        matplotlib.use("Agg")  # draws without a screen
        from matplotlib import pyplot
        from matplotlib.colors import LogNorm
    except ImportError:
        raise MissingExtraError("drawing needs matplotlib: pip install 'pyinfer[plot]'") from None
    return pyplot, LogNorm


def plot_placement(model: Path, output: Path) -> None:
    """Draw the placement in a model's section into an image file; its ending says of which kind.

    raises InputError (the model has no profile or no placement, the file cannot be written), as reading does
    """
    with open_gguf(model) as file:
        hp, _ = build_program(file)
        section = read_section(file)
        entries = section.entries if section else {}
        for name in ("profile", "placement"):
            if name not in entries:
                command = "profile" if name == "profile" else "place"
                raise InputError(f"{model}: has no {name}; make one with pyinfer-convert {command}")
        sizes = hp.block_count, hp.feed_forward_length
        profile = Profile.from_entry(entries["profile"], *sizes)
        placement = Placement.from_entry(entries["placement"], *sizes)
    where = "on the CPU"
    if placement.processor == ON_GPU:
        where = f"{format_amount(placement.budget_bytes, 'bytes')} of GPU memory"
    title = f"{model.name}: {where}, profile of {profile.tokens} tokens"
    figure = placement_figure(placement, profile.share, title)
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as error:
        raise InputError(f"{output}: cannot be written ({error})") from None


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), default="placement.png", show_default=True)
def main(model: Path, output: Path) -> None:
    """Draw the placement of MODEL."""
    try:
        plot_placement(model, output)
    except PyInferError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{output}: drawn", err=True)


if __name__ == "__main__":
    main()
