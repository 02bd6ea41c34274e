"""`pyinfer-convert`: a Hugging Face checkpoint or a GGUF file becomes a GGUF file of the types asked for.

Commands of their own, in files named after them, add what was learned about the neurons of such a file.
Everything it says goes to standard error; exit codes are those of `pyinfer_convert.terminal`.
"""

from __future__ import annotations

import importlib
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import click

from pyinfer import __version__, names
from pyinfer.errors import InputError
from pyinfer.progress import Progress, format_amount
from pyinfer_convert.recipe import QUANTS
from pyinfer_convert.terminal import Signals, exit_code, note

COMMANDS = {
    "profile": "Count on a text how often each neuron of a model fires.",
    "predict": "Add predictors, which tell beforehand what will fire.",
    "place": "Choose the neurons that a GPU keeps.",
}
_QUANT_IN_NAME = re.compile(r"[-._](" + "|".join(QUANTS) + r"|q[2-8]_k(_[sml])?|fp16|fp32)$", re.IGNORECASE)


def default_name(name: str, quant: str) -> str:
    """File name for a model of this name: "tiny.Q8_0" as q4_0 is "tiny-q4_0.gguf"."""
    return f"{_QUANT_IN_NAME.sub('', name) or 'model'}-{quant}.gguf"


def _describe(plan: Any) -> None:
    """The table of types and sizes, and what did not go as the recipe wants."""
    for kind, (count, n_bytes) in sorted(plan.by_type().items(), key=lambda each: -each[1][1]):
        plural = "s" if count > 1 else " "
        note(f"  {kind:<5} {count:>5} tensor{plural} {format_amount(n_bytes, 'bytes'):>10}")
    for (wanted, got, columns), count in plan.fallbacks().items():
        many = "tensor has" if count == 1 else "tensors have"
        note(f"  {count} {many} {columns} columns, no whole blocks of {wanted}: {got} instead")
    before, after = format_amount(plan.bytes_before, "bytes"), format_amount(plan.bytes_after, "bytes")
    note(f"  weights: {before} before, {after} now")


def _explain(plan: Any) -> None:
    """One line per tensor: shape, type before and after, why."""
    for each in plan.tensors:
        shape, choice = "x".join(map(str, each.source.shape)), each.choice
        why = f"{choice.fallback.name} does not fit" if choice.fallback is not None else choice.why
        types = f"{each.source.type.name:>5} -> {choice.type.name:<5}"
        note(f"  {each.source.name:<32} {shape:>14}  {types} {why}")


def _write(planned: Any, target: Path, options: dict[str, Any], signals: Signals) -> Any:
    from pyinfer_convert.pipeline import write

    with Progress(sys.stderr, f"writing {target.name}") as bar, signals.held():
        return write(
            planned,
            target,
            force=options["force"],
            n_threads=options["threads"],
            progress=signals.checked(bar),
        )


def _convert(options: dict[str, Any], signals: Signals) -> None:
    # what takes long to import, after the options were read
    from pyinfer.jit.kernel_cache import kernel_cache_is_cold
    from pyinfer_convert.pipeline import check, plan
    from pyinfer_convert.powerinfer import check_powerinfer, check_types, with_predictors
    from pyinfer_convert.sources import BY_NEURON, PLAIN, USUAL, GGUFSource, open_source

    given = options["source"]
    layout = PLAIN if options["plain"] else BY_NEURON if options["by_neuron"] else USUAL
    with Progress(sys.stderr, f"fetching {given}") as progress:
        source = open_source(given, layout=layout, progress=progress)
    try:
        for notice in source.notices:
            note(f"note: {notice}")
        if options["requant"] and not isinstance(source, GGUFSource):
            raise InputError(f"{given}: this is a checkpoint, but --requant is for a GGUF file; leave it out")
        if options["predictor"]:
            source = with_predictors(source, options["predictor"])
        quant, powerinfer = QUANTS[options["quant"]], options["format_"] == "powerinfer"
        if powerinfer:
            check_powerinfer(source, quant)
        target = options["output"] or Path(default_name(source.name, quant.name))
        head, predictor = options["output_quant"], options["predictor_quant"]
        planned = plan(
            source,
            quant,
            output_type=QUANTS[head].type if head else None,
            predictor_type=QUANTS[predictor].type if predictor else None,
            magic=names.MAGIC_POWERINFER if powerinfer else names.MAGIC,
        )
        if powerinfer:
            check_types((each.entry.name, each.entry.type) for each in planned.tensors)
        if options["verbose"]:
            _explain(planned)
        if options["dry_run"]:
            note(f"{target}: would have {format_amount(planned.file_bytes, 'bytes')}; nothing was written")
            _describe(planned)
            check(planned, target, force=options["force"])
            return
        if kernel_cache_is_cold():
            note("compiling kernels for this processor, once (some seconds)")
        summary = _write(planned, target, options, signals)
        rate = format_amount(summary.bytes_before / max(summary.seconds, 1e-3), "bytes")
        size = format_amount(summary.file_bytes, "bytes")
        note(f"{target}: {size}, {summary.seconds:.1f} s ({rate}/s of input)")
        _describe(planned)
    finally:
        source.close()


class _WithCommands(click.Command):
    """The conversion; a first argument that names one of COMMANDS makes it that, imported when asked for."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        if args and args[0] in COMMANDS:
            command = getattr(importlib.import_module(f"pyinfer_convert.cli_{args[0]}"), args[0])
            return command.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        return super().make_context(info_name, args, parent, **extra)

    def invoke(self, ctx: click.Context) -> Any:
        return super().invoke(ctx) if ctx.command is self else ctx.command.invoke(ctx)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Commands, each with its own --help"):
            formatter.write_dl([(f"{name} MODEL", text) for name, text in COMMANDS.items()])


_QUANT = click.Choice(list(QUANTS))


@click.command(
    cls=_WithCommands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100}
)
@click.argument("source", metavar="SRC")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The new file.  [SRC's name and quant]")
@click.option("--quant", type=_QUANT, default="q4_0", show_default=True, help="Type of the matrices.")
@click.option("--output-quant", type=_QUANT, help="Type of the output head.  [q6_k beside 4 and 5 bits]")
@click.option(
    "--predictor", type=click.Path(path_type=Path), help="Folder of predictors: model_0.pt, model_1.pt ..."
)
@click.option("--predictor-quant", type=_QUANT, help="Type of the predictors.  [as the matrices]")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["gguf", "powerinfer"]),
    default="gguf",
    show_default=True,
    help="powerinfer: a file that PowerInfer's own program loads, too.",
)
@click.option("--plain", is_flag=True, help="For llama.cpp, also sparse models: ffn_down, no predictors.")
@click.option(
    "--by-neuron",
    is_flag=True,
    help="ffn_down neuron by neuron, of SiLU and GELU models, too: what --sparsity cats=SHARE skips is not "
    "read then. llama.cpp cannot read such a file.",
)
@click.option("--requant", is_flag=True, help="SRC must be a GGUF file (which is seen without this, too).")
@click.option("-t", "--threads", type=click.IntRange(1, 256), help="Threads.  [as many as may be used]")
@click.option("--dry-run", is_flag=True, help="Only tell what would be written, or why not.")
@click.option("--force", is_flag=True, help="Replace an existing file.")
@click.option("-v", "--verbose", is_flag=True, help="Say why each tensor gets its type; tracebacks.")
@click.version_option(__version__, prog_name="pyinfer-convert")
@click.pass_context
def main(context: click.Context, **options: Any) -> None:
    """Make a GGUF file of SRC: the folder of a Hugging Face checkpoint, organisation/name, or a GGUF file.

    Example: pyinfer-convert stories15M -o story.gguf --quant q4_0

    A folder with the name of a command is given as ./profile.
    """
    if options["plain"] and (options["predictor"] or options["format_"] == "powerinfer"):
        other = "--predictor" if options["predictor"] else "--format powerinfer"
        raise click.UsageError(f"--plain makes a file without predictors; leave out --plain or {other}")
    if options["plain"] and options["by_neuron"]:
        raise click.UsageError("--plain and --by-neuron are opposites; leave out one of them")
    context.exit(exit_code(partial(_convert, options), "nothing was written", verbose=options["verbose"]))


if __name__ == "__main__":
    main()
