"""pyinfer-bench: how fast a model runs here, and how much of the machine's memory bandwidth that is; or only
what placing neurons needs to know of the machine (--hardware).
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import click

from pyinfer.errors import PyInferError
from pyinfer.neurons.hardware import GPUS, USUAL_GPU, Hardware, measure_hardware, write_hardware
from pyinfer.program.sparsity import DENSE
from pyinfer.runtime.loader import default_threads
from pyinfer_tools.engine import Engine, median, open_session, token_bytes
from pyinfer_tools.memory import peak_memory_bytes

_FIRST_PROMPT = 16  # tokens of the prompt whose first token is timed
_WARM_STEPS = 4


def measure(
    model: str,
    threads: int | None,
    n_prompt: int,
    n_decode: int,
    repeats: int,
    batch: int,
    sparsity: str,
) -> dict[str, object]:
    """What is measured on one model.

    n_prompt, n_decode : tokens per run, 0 leaves the run out;  batch : sequences decoded together
    sparsity : as `load_model` takes it
    decode_tokens_per_second counts the tokens of all sequences; first_token_seconds runs from the start of
    loading to the logits behind a prompt of 16 tokens; achieved_bytes_per_second is what decode reads of the
    file's weights, and left out where it skips neurons.
    """
    start = time.perf_counter()
    n_ctx = max(n_prompt, n_decode, _FIRST_PROMPT)
    with open_session(model, n_ctx, threads, batch, sparsity) as (loaded, session):
        load_seconds = time.perf_counter() - start
        for notice in loaded.notices:
            click.echo(f"note: {notice}", err=True)
        engine = Engine(session)
        engine.prefill_run(_FIRST_PROMPT)
        first_token_seconds = time.perf_counter() - start
        figures: dict[str, object] = {
            "model": model,
            "threads": session.n_threads,
            "batch": batch,
            "sparsity": sparsity,
            "load_seconds": load_seconds,
            "first_token_seconds": first_token_seconds,
        }
        if n_prompt:
            engine.prefill_run(n_prompt)
            seconds = [engine.prefill_run(n_prompt) for _ in range(repeats)]
            figures["prefill_tokens_per_second"] = n_prompt / median(seconds)
        if n_decode:
            engine.decode_run(min(_WARM_STEPS, n_decode), n_sequences=batch)
            seconds = [engine.decode_run(n_decode, n_sequences=batch)[1] for _ in range(repeats)]
            steps_per_second = n_decode / median(seconds)
            figures["decode_tokens_per_second"] = batch * steps_per_second
            if loaded.plan.modes == {DENSE}:
                figures["achieved_bytes_per_second"] = steps_per_second * token_bytes(loaded)
        figures["peak_memory_bytes"] = peak_memory_bytes()
        figures["file_bytes"] = loaded.file.file_bytes
    return figures


def report(figures: dict[str, object]) -> str:
    """The figures as lines for people."""
    shown = [
        ("prefill_tokens_per_second", "prefill", 1, "tokens/s"),
        ("decode_tokens_per_second", "decode", 1, "tokens/s"),
        ("load_seconds", "load", 1, "s"),
        ("first_token_seconds", "first token", 1, "s"),
        ("peak_memory_bytes", "peak memory", 1e6, "MB"),
        ("file_bytes", "file", 1e6, "MB"),
        ("achieved_bytes_per_second", "weights read in decode", 1e9, "GB/s"),
        ("read_bandwidth_bytes_per_second", "machine's read bandwidth", 1e9, "GB/s"),
    ]
    lines = [
        f"{figures['model']}, {figures['threads']} threads, batch {figures['batch']}, "
        f"sparsity {figures['sparsity']}"
    ]
    for key, label, divisor, unit in shown:
        if key in figures:
            lines.append(f"{label:>25} {figures[key] / divisor:12,.2f} {unit}")
    return "\n".join(lines)


def hardware_report(hardware: Hardware) -> str:
    """The figures of a machine as lines for people."""
    shown = [
        (hardware.cpu, "cpu_bytes_per_second", hardware.cpu_bytes_per_second / 1e9, "GB/s"),
        (hardware.gpu, "gpu_bytes_per_second", hardware.gpu_bytes_per_second / 1e9, "GB/s"),
        (hardware.gpu, "vram_bytes", hardware.vram_bytes / (1 << 30), "GiB"),
        ("a meeting of both", "sync_seconds", hardware.sync_seconds * 1e6, "us"),
    ]
    lines = []
    for label, name, value, unit in shown:
        how = "measured" if name in hardware.measured else "not measured"
        lines.append(f"{label:>30} {value:10,.1f} {unit:<5} {how}")
    return "\n".join(lines)


def _bench_hardware(options: dict[str, Any]) -> str:
    hardware = measure_hardware(options["threads"] or default_threads(), options["gpu"])
    if options["output"]:
        write_hardware(options["output"], hardware)
    return json.dumps(hardware.to_dict()) if options["as_json"] else hardware_report(hardware)


def _bench_model(options: dict[str, Any]) -> str:
    names = ("model", "threads", "n_prompt", "n_decode", "repeats", "batch", "sparsity")
    figures = measure(**{name: options[name] for name in names})
    # Now that the model is closed and forgotten, because it needs memory of its own.
    from pyinfer.jit import read_bandwidth

    figures["read_bandwidth_bytes_per_second"] = read_bandwidth(figures["threads"])
    return json.dumps(figures) if options["as_json"] else report(figures)


@click.command()
@click.option("-m", "--model", help="A GGUF file or the name of a known model.")
@click.option("--hardware", is_flag=True, help="Measure the machine instead, for pyinfer-convert place.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="With --hardware: write its file.")
@click.option(
    "--gpu",
    type=click.Choice(list(GPUS), case_sensitive=False),
    default=USUAL_GPU,
    show_default=True,
    help="With --hardware: the card whose data sheet stands for figures that cannot be measured.",
)
@click.option("--threads", type=click.IntRange(1), help="Threads.  [as pyinfer-generate chooses]")
@click.option("-p", "n_prompt", type=click.IntRange(0), default=512, show_default=True, help="Prompt tokens.")
@click.option("-n", "n_decode", type=click.IntRange(0), default=64, show_default=True, help="Decode steps.")
@click.option(
    "-r", "repeats", type=click.IntRange(1), default=5, show_default=True, help="Runs; medians count."
)
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Sequences per step.")
@click.option(
    "--sparsity",
    default="auto",
    show_default=True,
    help="Which neurons are computed: auto, exact, predicted, cats=SHARE, dense. On the random tokens that "
    "are run here other neurons fire than on a text.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(**options: Any) -> None:
    """Measure prefill, decode, load and memory of a model, or the machine itself."""
    if bool(options["model"]) == options["hardware"]:
        raise click.UsageError("give either a model (-m) or --hardware")
    if options["output"] and not options["hardware"]:
        raise click.UsageError("-o is for --hardware; the figures of a model go to standard output")
    try:
        text = _bench_hardware(options) if options["hardware"] else _bench_model(options)
    except (PyInferError, OSError, MemoryError) as error:
        raise click.ClickException(str(error) or type(error).__name__) from error
    click.echo(text)


if __name__ == "__main__":
    main()
