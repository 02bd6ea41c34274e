"""`pyinfer-convert predict`: make predictors of a model's neurons from text, and write the model with them.

Everything it says goes to standard error; exit codes are those of `pyinfer_convert.terminal`.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from pyinfer.errors import InputError
from pyinfer.progress import Progress, format_amount
from pyinfer_convert.shared_options import model_and_texts, threads_option
from pyinfer_convert.terminal import Signals, exit_code, note

if TYPE_CHECKING:
    from pyinfer_convert.calibration import Rows
    from pyinfer_convert.predict import Layer, Wish

USUAL_TOKENS = 65_536


def _collect(path: Path, options: dict[str, Any], folder: Path, signals: Signals) -> tuple[Rows, str]:
    """Rows of the model on the texts, and its activation."""
    from pyinfer.jit.kernel_cache import kernel_cache_is_cold
    from pyinfer.neurons.sparsity import ZEROING
    from pyinfer.runtime.loader import load_model
    from pyinfer_convert.calibration import collect, read_windows

    if kernel_cache_is_cold():
        note("compiling kernels for this processor, once (some seconds)")
    with Progress(sys.stderr, f"reading {path.name}") as bar:
        model = load_model(path, observe="rows", progress=bar)
    with model:
        activation = next(op.params["activation"] for op in model.program.ops if "activation" in op.params)
        if activation.partition(":")[0] not in ZEROING:
            raise InputError(
                f"{path.name}: {activation} leaves no neuron at zero, expected a model with ReLU; "
                "predictors would have nothing to predict"
            )
        most = model.program.most_positions or model.hparams.context_length
        length = min(model.hparams.context_length, most)
        windows = read_windows(options["texts"], model.tokenizer, length, options["tokens"])
        with _shown("running the model on the text", "tokens", signals) as progress:
            return collect(model, windows, folder, options["threads"], progress), activation


@contextlib.contextmanager
def _shown(label: str, unit: str, signals: Signals) -> Iterator[Any]:
    """A progress bar for work of the team's threads, which a signal ends between two parts only."""
    with Progress(sys.stderr, label, unit) as bar, signals.held():
        yield signals.checked(bar)


def _trainer(wish: Wish, layers: int) -> Any:
    """What trains a layer, with a progress bar of its own; raises MissingExtraError without torch."""
    from pyinfer_convert.train_predictor import train

    done = 0

    def trained(found: Any, rank: int, chunks: Any) -> Any:
        nonlocal done
        done += 1
        with Progress(sys.stderr, f"training layer {done} of {layers}", "steps") as bar:
            return train(
                found, rank, chunks, form=wish.form, type_=wish.type, recall=wish.recall, progress=bar
            )

    return trained


def _predict(path: Path, options: dict[str, Any], signals: Signals) -> None:
    from pyinfer.gguf_file import open_gguf
    from pyinfer.model_store import check_may_change
    from pyinfer_convert.output import check_target
    from pyinfer_convert.predict import Wish, ffn_bytes, make_predictors
    from pyinfer_convert.predictor_file import write_with_predictors
    from pyinfer_convert.recipe import QUANTS

    began = time.monotonic()
    target = options["output"] or Path(f"{path.stem}-predicted.gguf")
    check_may_change(target)
    check_target(target, [path] if path.exists() else [], options["force"])
    wish = Wish(options["recall"], options["budget"], QUANTS[options["quant"]].type, options["form"])
    train = partial(_trainer, wish) if options["train"] else None
    if train is not None:
        train(0)  # what is missing is said before the work
    folder = target.resolve().parent
    rows, activation = _collect(path, options, folder, signals)
    with rows, open_gguf(path) as file:
        with Progress(sys.stderr, "fitting predictors", "steps") as bar:
            layers = make_predictors(
                file, rows, activation, wish, folder, tick=bar, train=train and train(rows.n_layers)
            )
        whole = sum(ffn_bytes(file, layer)[0] for layer in range(len(layers)))
        with _shown(f"writing {target.name}", "bytes", signals) as progress:
            notices = write_with_predictors(
                file, layers, target, force=options["force"], threads=options["threads"], progress=progress
            )
    for line in describe(layers, whole):
        note(line)
    for notice in notices:
        note(f"note: {notice}")
    size = format_amount(target.stat().st_size, "bytes")
    note(f"{target}: {size}, with predictors; {time.monotonic() - began:.0f} s")


def describe(layers: Sequence[Layer], ffn_bytes: int) -> list[str]:
    """The table: per layer and in all. ffn_bytes : of all feed-forward layers"""
    lines = ["layer   rank    form  recall  precision  predicted   fired"]
    for index, layer in enumerate(layers):
        each = layer.quality
        lines.append(
            f"{index:>5} {each.rank:>6}  {each.form:>6} {each.recall:>7.2%} {each.precision:>10.1%} "
            f"{each.predicted:>10.1%} {each.fired:>7.1%}"
        )
    n_bytes = sum(matrix.packed.nbytes for layer in layers for matrix in (layer.fc1, layer.fc2))
    mean = {
        name: sum(getattr(layer.quality, name) for layer in layers) / len(layers)
        for name in ("recall", "precision", "predicted", "fired")
    }
    lines.append(
        f" mean {'':>14} {mean['recall']:>7.2%} {mean['precision']:>10.1%} {mean['predicted']:>10.1%} "
        f"{mean['fired']:>7.1%}"
    )
    lines.append(
        f"predictors: {format_amount(n_bytes, 'bytes')}, {n_bytes / ffn_bytes:.1%} of the FFN; "
        f"measured on {layers[0].quality.tokens} tokens that nothing was fitted to"
    )
    return lines


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@model_and_texts(": what the model shall be good at")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="New file.  [MODEL-predicted.gguf]")
@click.option(
    "--recall",
    type=click.FloatRange(0.5, 0.9999),
    default=0.99,
    show_default=True,
    help="Of the neurons that fire so many are to be predicted, in every layer.",
)
@click.option(
    "--budget",
    type=click.FloatRange(0, 1, min_open=True),
    default=0.08,
    show_default=True,
    help="Most bytes of all predictors, as a share of the feed-forward layers' bytes.",
)
@click.option("--train", is_flag=True, help="Train what the closed form gives (extra [train]: torch).")
@click.option(
    "--form",
    type=click.Choice(["linear", "relu"]),
    default="linear",
    show_default=True,
    help="relu: as PowerInfer has them, between the two matrices; only with --train.",
)
@click.option(
    "--tokens",
    type=click.IntRange(1, 1 << 40),
    default=USUAL_TOKENS,
    show_default=True,
    help="Tokens of the texts: three quarters to fit, the others to choose thresholds and to measure.",
)
@click.option(
    "--quant",
    type=click.Choice(["q4_0", "q8_0"]),
    default="q4_0",
    show_default=True,
    help="Type of predictors.",
)
@click.option("--force", is_flag=True, help="Replace an existing file.")
@threads_option
@click.option("-v", "--verbose", is_flag=True, help="Tracebacks.")
@click.pass_context
def predict(
    context: click.Context, model: Path, more: tuple[Path, ...], texts: tuple[Path, ...], **options: Any
) -> None:
    """Write MODEL again with predictors, which tell from a layer's input which of its neurons will fire.

    The size of each layer's predictor follows from what it saves, within the budget. Example:
    pyinfer-convert predict story.gguf --text c4.txt -o story-predicted.gguf
    """
    options["texts"] = (*texts, *more)
    if not options["texts"]:
        raise click.UsageError("Give texts to learn from: --text FILES...")
    if options["form"] == "relu" and not options["train"]:
        raise click.UsageError("--form relu needs --train; without it predictors are linear.")
    context.exit(
        exit_code(partial(_predict, model, options), "nothing was written", verbose=options["verbose"])
    )
