"""`pyinfer-convert place`: choose which neurons of a model a GPU keeps, and write that into its section.

Everything it says goes to standard error; exit codes are those of `pyinfer_convert.terminal`.
"""

from __future__ import annotations

import math
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np

from pyinfer.errors import FormatError, InputError
from pyinfer.progress import format_amount
from pyinfer_convert.terminal import exit_code, note

if TYPE_CHECKING:
    from pyinfer.neurons.budget import ModelBytes
    from pyinfer.neurons.hardware import Hardware
    from pyinfer.neurons.placement import Placement

USUAL_CONTEXT = 4096
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?)B)?", re.IGNORECASE)
_MOST_BYTES = 1 << 50


class SizeType(click.ParamType):
    """A number of bytes: 8GiB, 512MiB, 1.5 GB, 0."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = _SIZE.fullmatch(value.strip())
        if match is None:
            self.fail(
                f"{value[:40]!r} is no size; write 8GiB, 512MiB, 1.5GB or a number of bytes", param, ctx
            )
        number, prefix, binary = match.groups()
        power = "KMGT".index(prefix.upper()) + 1 if prefix else 0
        n_bytes = float(number) * (1024 if binary else 1000) ** power
        if not n_bytes <= _MOST_BYTES:
            self.fail(f"{value[:40]!r} is more memory than any machine has", param, ctx)
        return math.floor(n_bytes)


def _hardware(options: dict[str, Any]) -> Hardware:
    from pyinfer.neurons.hardware import measure_hardware, read_hardware
    from pyinfer.runtime.loader import default_threads

    if options["hardware"]:
        if options["gpu"]:
            raise InputError("--gpu is for a machine without figures; leave it or --hardware out")
        return read_hardware(options["hardware"])
    note("measuring how fast this machine reads its memory (pyinfer-bench --hardware keeps the figures)")
    given = {"gpu": options["gpu"]} if options["gpu"] else {}
    return measure_hardware(options["threads"] or default_threads(), **given)


def _read(path: Path, n_ctx: int) -> tuple[Any, ModelBytes]:
    """The profile of a model's file, and its bytes; the file is closed again, as writing to it wants."""
    from pyinfer.gguf_file import open_gguf
    from pyinfer.neurons.budget import model_bytes
    from pyinfer.neurons.profile import Profile
    from pyinfer.section import read_section

    with open_gguf(path) as file:
        model = model_bytes(file, n_ctx)
        section = read_section(file)
        entry = section.entries.get("profile") if section else None
        if entry is None:
            raise InputError(
                f"{path.name}: has no profile of its neurons; make one first: "
                f"pyinfer-convert profile {path.name} --text FILE"
            )
        try:
            profile = Profile.from_entry(entry, model.n_layers, model.n_neurons)
        except FormatError as error:
            raise FormatError(f"{path.name}: {error}") from None
    if not profile.counts.any():
        raise InputError(
            f"{path.name}: its profile ({profile.tokens} tokens, activation {profile.activation}) counts no "
            "neuron that fired, expected one of a model with ReLU; this model runs without a placement"
        )
    return profile, model


def _place(path: Path, options: dict[str, Any]) -> None:
    from pyinfer.model_store import check_may_change
    from pyinfer.neurons.placement import place, place_on_cpu
    from pyinfer.section import update_section

    if not options["dry_run"]:
        check_may_change(path)
    profile, model = _read(path, options["ctx"])
    budget, hardware, notices = options["vram"], None, []
    start = time.perf_counter()
    placement = None
    if budget:
        hardware = _hardware(options)
        if (options["hardware"] or options["gpu"]) and budget > hardware.vram_bytes:
            there = format_amount(hardware.vram_bytes, "bytes")
            raise InputError(
                f"--vram is {format_amount(budget, 'bytes')}, but {hardware.gpu or 'the GPU'} has {there}"
            )
        start = time.perf_counter()
        placement, notices = place(
            profile.counts, model, budget, hardware, options["solver"], options["time_limit"]
        )
    if placement is None or not placement.resident:
        if not budget:
            notices = ["--vram is 0: nothing is on a GPU"]
        notices.append(
            "hot are the neurons that fire for at least half of the tokens: the CPU computes them always"
        )
        placement = place_on_cpu(profile.counts, profile.tokens, model)
    seconds = time.perf_counter() - start
    for line in describe(placement, model, profile.counts, seconds):
        note(line)
    for notice in notices:
        note(f"note: {notice}")
    if options["dry_run"]:
        note(f"{path}: nothing was written")
        return
    update_section(path, placement=placement.to_entry())
    note(f"{path}: the placement is in its section")


def describe(placement: Placement, model: ModelBytes, counts: np.ndarray, seconds: float) -> list[str]:
    """The table: layers, the budget by purpose, and what the plan is worth."""
    hardware = placement.hardware
    lines = ["layer  hot neurons    of all  activations" + ("  at least" if hardware else "")]
    totals = np.maximum(counts.sum(1), 1)
    covered = np.where(placement.hot, counts, 0).sum(1) / totals
    for layer, hot in enumerate(placement.hot_neurons):
        least = ""
        if hardware:
            fewest = hardware.least_neurons(model.neuron[layer])
            least = "never" if fewest is None else "all" if fewest > model.n_neurons else str(fewest)
            least = f"{least:>10}"
        lines.append(f"{layer:>5} {hot:>12} {hot / model.n_neurons:>9.1%} {covered[layer]:>12.1%}{least}")
    hot = int(placement.hot.sum())
    lines.append(
        f"  all {hot:>12} {hot / placement.hot.size:>9.1%} {placement.objective / placement.total:>12.1%}"
    )
    used = sum(placement.n_bytes.values())
    for purpose, n_bytes in placement.n_bytes.items():
        lines.append(f"{purpose.replace('_', ' '):>12} {format_amount(n_bytes, 'bytes'):>10}")
    if placement.n_bytes:
        budget = format_amount(placement.budget_bytes, "bytes")
        lines.append(f"{'in all':>12} {format_amount(used, 'bytes'):>10} of {budget}")
    if hardware:
        how = "measured" if "cpu_bytes_per_second" in hardware.measured else "not measured"
        gpu = "measured" if "gpu_bytes_per_second" in hardware.measured else "not measured"
        lines.append(
            f"memory: CPU {hardware.cpu_bytes_per_second / 1e9:.1f} GB/s ({how}), {hardware.gpu or 'GPU'} "
            f"{hardware.gpu_bytes_per_second / 1e9:.0f} GB/s ({gpu}); "
            f"a meeting of both {hardware.sync_seconds * 1e6:.0f} us"
        )
    lines.append(
        f"objective {placement.objective} by {placement.solver}, greedy {placement.greedy_objective}, "
        f"bound {placement.bound}, gap {placement.gap:.2e}, {seconds:.1f} s"
    )
    return lines


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--vram", type=SizeType(), required=True, help="GPU memory to use: 8GiB, 512MiB; 0: no GPU.")
@click.option(
    "--ctx",
    type=click.IntRange(1, 1 << 31),
    default=USUAL_CONTEXT,
    show_default=True,
    help="Tokens that the KV cache has room for.",
)
@click.option(
    "--hardware", type=click.Path(path_type=Path), help="Figures of pyinfer-bench --hardware.  [measured now]"
)
@click.option("--gpu", help="Known card, like 'rtx 4060' (the usual one), when no figures are given.")
@click.option(
    "--solver",
    type=click.Choice(["exact", "mip", "greedy"]),
    default="exact",
    show_default=True,
    help="exact: a dynamic program; mip: the paper's integer program, by python-mip; greedy: a first guess.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(0, 86400, min_open=True),
    default=10.0,
    show_default=True,
    help="Seconds for --solver mip.",
)
@click.option("--dry-run", is_flag=True, help="Show the placement, write nothing.")
@click.option(
    "-t", "--threads", type=click.IntRange(1, 256), help="Threads to measure with.  [all that may be used]"
)
@click.option("-v", "--verbose", is_flag=True, help="Tracebacks.")
@click.pass_context
def place(context: click.Context, model: Path, **options: Any) -> None:
    """Choose which neurons of MODEL the GPU keeps, from its profile, and write that into MODEL's section.

    The budget holds first what every token needs: attention, KV cache, output head, predictors; then the
    neurons that fire most. Example: pyinfer-convert place story.gguf --vram 8GiB --ctx 4096
    """
    context.exit(
        exit_code(
            lambda signals: _place(model, options),
            "the file has its old placement or the new one",
            verbose=options["verbose"],
        )
    )
