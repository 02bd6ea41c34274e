"""Draw what a model's file says of its neurons: how unevenly they fire, which are hot, what predictors do.

pip install 'pyinfer[plot]'
python -m pyinfer_tools.plot_neurons story.gguf -o neurons.png
"""

from __future__ import annotations

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from pyinfer import names
from pyinfer.errors import FormatError, InputError, MissingExtraError, PyInferError
from pyinfer.gguf_file import open_gguf
from pyinfer.model_store import find_model
from pyinfer.neurons.budget import ModelBytes, model_bytes
from pyinfer.neurons.placement import Placement
from pyinfer.neurons.predictor import Predictors
from pyinfer.neurons.profile import Profile
from pyinfer.section import read_section
from pyinfer_tools.plot_panels import STYLE, draw_activations, draw_placement, draw_predictors, printable

ACTIVATIONS, PLACEMENT, PREDICTORS, ALL = PICTURES = "activations", "placement", "predictors", "all"
ENDINGS = "png", "svg", "pdf"
_WIDTH, _HEIGHTS = 9.0, {ACTIVATIONS: 4.3, PLACEMENT: 7.5, PREDICTORS: 5.6}  # inches


@dataclass(frozen=True, eq=False)
class Neurons:
    """What is drawn, None where the file lacks it. sizes : for the context that the placement is for"""

    path: Path
    sizes: ModelBytes
    profile: Profile | None
    placement: Placement | None
    predictors: Predictors | None
    predicts: bool  # has predictors at all

    def missing(self, picture: str) -> str | None:
        """Why a picture cannot be drawn and which command helps; None where it can."""
        name = self.path.name
        if picture == PREDICTORS:
            if self.predictors is not None:
                return None
            there = "says nothing of how good its predictors are" if self.predicts else "has no predictors"
            rather = "; predictors are for models with ReLU" if self._never_zero else ""
            return f"{name}: {there}{rather or f'; pyinfer-convert predict {name} --text FILE makes some'}"
        if self.profile is None:
            return f"{name}: has no profile; make one with pyinfer-convert profile {name} --text FILE"
        if self._never_zero and picture == PLACEMENT:
            return f"{name}: has no placement; placements are for models with ReLU"
        counted = self.profile.counts if self.profile.histogram is None else self.profile.histogram
        if not counted.any():
            return (
                f"{name}: its profile, of {self.profile.tokens} tokens, counts no neuron that fired; "
                f"make another with pyinfer-convert profile {name} --fresh --text FILE"
            )
        if picture == PLACEMENT and self.placement is None:
            return f"{name}: has no placement; make one with pyinfer-convert place {name} --vram SIZE"
        return None

    @property
    def _never_zero(self) -> bool:
        return self.profile is not None and self.profile.histogram is not None


def read_neurons(path: Path) -> Neurons:
    """Everything that a file's section says; raises FormatError where it is damaged or does not fit."""
    with open_gguf(path) as file:
        sizes = model_bytes(file, 1)
        section = read_section(file)
        entries = section.entries if section else {}
        found: dict[str, Any] = {}
        for name, kind in (("profile", Profile), ("placement", Placement), ("predictors", Predictors)):
            try:
                entry = entries.get(name)
                found[name] = entry and kind.from_entry(entry, sizes.n_layers, sizes.n_neurons)
            except FormatError as error:
                raise FormatError(f"{path.name}: {error}") from None
        predicts = names.weight(names.FC1, 0) in file.tensors
    return Neurons(path, sizes, predicts=predicts, **found)


def neuron_figure(neurons: Neurons, pictures: list[str], layer: int) -> Any:
    """A matplotlib figure of these pictures, one below the other.

    raises InputError where the file lacks one of them, MissingExtraError without matplotlib
    """
    figure_class, style = _matplotlib()
    for picture in pictures:
        problem = neurons.missing(picture)
        if problem is not None:
            raise InputError(problem)
    heights = [_HEIGHTS[picture] for picture in pictures]
    with style():
        figure = figure_class(figsize=(_WIDTH, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(pictures), 1, height_ratios=heights, squeeze=False)[:, 0]
        title = printable(neurons.path.name)
        for part, picture in zip(parts, pictures):
            if picture == ACTIVATIONS:
                draw_activations(part, neurons.profile, layer, title)
            elif picture == PLACEMENT:
                draw_placement(part, neurons.placement, neurons.profile, neurons.sizes, title)
            else:
                draw_predictors(part, neurons.predictors, neurons.sizes, title)
    return figure


def _matplotlib() -> tuple[Any, Any]:
    """The class of figures, which draws without a screen, and what sets our style for a while."""
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingExtraError("drawing needs matplotlib: pip install 'pyinfer[plot]'") from None
    return Figure, lambda: style.context(["default", STYLE])


def save(figure: Any, output: Path) -> None:
    """Write the picture, its kind by its ending; raises InputError where that is impossible."""
    ending = output.suffix[1:].lower()
    if ending not in ENDINGS:
        raise InputError(f"{output}: pictures end with {', '.join('.' + each for each in ENDINGS)}")
    drawn = io.BytesIO()
    with _matplotlib()[1](), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters of a file's name that the font does not have
        figure.savefig(drawn, format=ending)
    part = output.with_name(output.name + ".part")
    try:
        try:
            with open(part, "wb") as stream:
                stream.write(drawn.getbuffer())
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(part, output)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error.strerror or error})") from None


def _draw(model: str, output: Path | None, what: str, layer: int | None) -> Path:
    _matplotlib()  # what is missing is said before the work
    neurons = read_neurons(find_model(model, offline=True))
    output = output or Path(f"{neurons.path.stem}-{'neurons' if what == ALL else what}.png")
    last = neurons.sizes.n_layers - 1
    if layer is not None and layer > last:
        raise InputError(f"--layer is {layer}, but the layers of {neurons.path.name} are 0 to {last}")
    pictures = list(_HEIGHTS) if what == ALL else [what]
    if what == ALL:
        problems = {picture: neurons.missing(picture) for picture in pictures}
        pictures = [picture for picture in pictures if problems[picture] is None]
        if not pictures:
            raise InputError(problems[ACTIVATIONS])
        for problem in dict.fromkeys(filter(None, problems.values())):
            click.echo(f"note: {problem}", err=True)
    save(neuron_figure(neurons, pictures, (last + 1) // 2 if layer is None else layer), output)
    return output


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="PNG, SVG or PDF.  [MODEL-neurons.png]")
@click.option(
    "--what",
    type=click.Choice(PICTURES),
    default=ALL,
    show_default=True,
    help="One of the pictures, or all that the model has the figures for.",
)
@click.option(
    "--layer", type=click.IntRange(0), help="Of which layer activations are shown.  [the middle one]"
)
def main(model: str, output: Path | None, what: str, layer: int | None) -> None:
    """Draw what MODEL's file says of its neurons.

    activations: how many neurons cause how much of all activations (or, for models with SiLU or GELU, how
    large activations are); placement: which neurons are hot, and the GPU's memory; predictors: their recall,
    precision and size.
    """
    try:
        click.echo(f"{_draw(model, output, what, layer)}: drawn", err=True)
    except PyInferError as error:
        raise click.ClickException(str(error)) from error


if __name__ == "__main__":
    main()
