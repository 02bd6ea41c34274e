"""Turn a SwiGLU checkpoint into one whose neurons mostly do not fire, by distilling it from itself.

    python -m pyinfer_tools.relufy stories15M -o stories15M-relu --sparsity 0.85 --minutes 120
    pyinfer-convert stories15M-relu -o stories15M-relu.gguf --quant q8_0

Needs the extra `train`. The student is the teacher with JumpReLU gates: a neuron fires where its gate exceeds
its own learned threshold. It learns from text that the teacher itself writes, or from yours.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from pyinfer.errors import MissingExtraError, PyInferError

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.command()
@click.argument("teacher", type=click.Path(path_type=Path))
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option("--text", type=_FILE, multiple=True, help="Text to learn from.  [the teacher's own]")
@click.option("--tokens", default=50_000_000, show_default=True, type=click.IntRange(1), help="To train on.")
@click.option("--minutes", default=0.0, type=click.FloatRange(0), help="End the training by then.")
@click.option(
    "--sparsity",
    default=0.85,
    show_default=True,
    type=click.FloatRange(0.3, 0.98),
    help="Share of gates at zero.",
)
@click.option(
    "--corpus",
    default=10_000_000,
    show_default=True,
    type=click.IntRange(1),
    help="Different tokens of text.",
)
@click.option(
    "--heldout", default=131_072, show_default=True, type=click.IntRange(1), help="Tokens to judge by."
)
@click.option(
    "--rate",
    default=1e-4,
    show_default=True,
    type=click.FloatRange(0, min_open=True),
    help="Of learning, at first.",
)
@click.option("--threads", default=2, show_default=True, type=click.IntRange(1))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0))
@click.option("--device", default="auto", show_default=True, type=click.Choice(["auto", "cpu", "cuda"]))
@click.option("--resume/--fresh", default=True, help="Go on with an earlier run in the folder.  [resume]")
@click.option("--state", type=_FILE, help="Train no further: write this state of training/ as checkpoint.")
def main(teacher: Path, output: Path, state: Path | None, **options: object) -> None:
    """Make a ReLU-family checkpoint of TEACHER, the folder of a LLaMA checkpoint with SiLU gates.

    A run that was stopped goes on when the same command is given again. With a limit in minutes, sparsity
    and learning rate follow the clock, so that the last checkpoint is the finished one.
    """
    try:
        report = _make(teacher, output, state, options)
    except PyInferError as error:
        raise click.ClickException(str(error)) from error
    except KeyboardInterrupt:
        click.echo("stopped; the same command goes on from the last check", err=True)
        sys.exit(1)
    click.echo(report)


def _make(teacher: Path, output: Path, state: Path | None, options: dict) -> str:
    try:
        import torch  # noqa: F401
    except ImportError:
        raise MissingExtraError("relufy trains with torch; run: pip install pyinfer[train]") from None
    from pyinfer_tools.relufy_files import read_teacher
    from pyinfer_tools.relufy_run import Run, Settings, markdown
    from pyinfer_tools.relufy_train import Plan

    plan = Plan(
        tokens=options["tokens"],
        minutes=options["minutes"],
        sparsity=options["sparsity"],
        rate=options["rate"],
        threads=options["threads"],
        seed=options["seed"],
    )
    settings = Settings(
        text=options["text"],
        corpus_tokens=options["corpus"],
        heldout_tokens=options["heldout"],
        fresh=not options["resume"],
        device=options["device"],
    )
    run = Run(read_teacher(teacher), output, settings, plan)
    run.gather()
    run.open()
    if state is None:
        run.train(lambda line: click.echo(line, err=True))
    return markdown(run.export(state))


if __name__ == "__main__":
    main()
