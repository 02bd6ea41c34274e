"""The same model, threads and lengths through pyinfer and through llama.cpp, taking turns in one run.

    python -m pyinfer_tools.versus -m MODEL [-m MODEL2] --threads 2 -p 512 -n 64 -r 5 [--json] [--busy]
    python -m pyinfer_tools.versus -m SPARSE --sparsity predicted --peer-model DENSE
    python -m pyinfer_tools.versus -m SPARSE --peer pyinfer --peer-model DENSE --batch 1 --batch 8

A sparse model, whose file llama.cpp does not read or has no use for, meets a dense one of the same shape: in
llama.cpp, or (--peer pyinfer) in ours, computed densely.

Each engine lives in a process of its own; while one works, the other waits for a line on its stdin. What the
waiting one uses of the processor is measured too, because it would spoil the other's figure. Needs the extra
`[peers]`.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import click

from pyinfer.errors import PyInferError
from pyinfer_tools.engine import median
from pyinfer_tools.versus_worker import ENGINES

_PAUSE_SECONDS = 0.1  # threads of the engine that just worked go to sleep
_BUSY_LIMIT_SECONDS = 20.0  # per run: a spinning engine on a busy machine makes a token in seconds
_BUSY_LOOP = """
import os, sys, threading
threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
while True: pass
"""


class WorkerError(PyInferError):
    """An engine cannot do what it is asked."""


@dataclass(frozen=True)
class Side:
    """What is compared. label : in tables;  sparsity : of pyinfer, see `pyinfer.runtime.loader.load_model`"""

    label: str
    engine: str
    model: str
    sparsity: str = "auto"


class Worker:
    """One side's process. most_batch : sequences that a step may have"""

    def __init__(self, side: Side, n_ctx: int, threads: int, most_batch: int = 1) -> None:
        command = [sys.executable, "-m", "pyinfer_tools.versus_worker", "--engine", side.engine]
        command += ["-m", side.model, "--ctx", str(n_ctx), "--threads", str(threads)]
        command += ["--sparsity", side.sparsity, "--most-batch", str(most_batch)]
        self.label = side.label
        self.idle_cpu_seconds = 0.0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        try:
            self.build: str = self._answer()["build"]
        except BaseException:
            self.close()
            raise

    def speed(self, work: str, tokens: int, limit_seconds: float | None = None, batch: int = 1) -> float:
        """Tokens per second of one run; work is "prefill" or "decode", the latter of `batch` sequences."""
        time.sleep(_PAUSE_SECONDS)
        request = {"do": work, "tokens": tokens, "limit_seconds": limit_seconds, "batch": batch}
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells more
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        answer = self._answer()
        self.idle_cpu_seconds += answer["idle_cpu_seconds"]
        return answer["tokens"] / answer["seconds"]

    def close(self) -> None:
        """End the process, which stops when its stdin does."""
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(f"the process of {self.label} ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.label}: {answer['error']}")
        return answer


def compare(
    workers: list[Worker], work: str, tokens: int, repeats: int, limit: float | None = None, batch: int = 1
) -> dict:
    """Speeds of both sides in turns, and the ratio of each pair."""
    for worker in workers:
        worker.speed(work, min(tokens, 8) if work == "decode" else tokens, limit, batch)
    speeds: dict[str, list[float]] = {worker.label: [] for worker in workers}
    for index in range(repeats):
        for worker in workers:
            speeds[worker.label].append(worker.speed(work, tokens, limit, batch))
        last = ", ".join(f"{label} {runs[-1]:.1f}" for label, runs in speeds.items())
        click.echo(f"{work} {tokens}, run {index + 1} of {repeats}: {last} tokens/s", err=True)
    ours, theirs = speeds.values()
    ratios = sorted(our / their for our, their in zip(ours, theirs))
    return {
        "work": work,
        "tokens": tokens,
        "batch": batch,
        "tokens_per_second": {label: median(runs) for label, runs in speeds.items()},
        "runs": speeds,
        "ratio_min": ratios[0],
        "ratio_median": median(ratios),
        "ratio_max": ratios[-1],
    }


@contextlib.contextmanager
def busy_core() -> Iterator[subprocess.Popen]:
    """Another process keeps one core busy meanwhile; it ends with this one, whatever happens."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY_LOOP], stdin=subprocess.PIPE)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        process.stdin.close()


def versus(
    sides: list[Side],
    threads: int,
    n_prompt: int,
    n_decode: int,
    repeats: int,
    *,
    busy: bool = False,
    batches: tuple[int, ...] = (1,),
) -> dict:
    """All comparisons of one model: the first of two sides with the second."""
    n_ctx = max(n_prompt, n_decode)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        workers = []
        for side in sides:
            workers.append(Worker(side, n_ctx, threads, max(batches)))
            stack.callback(workers[-1].close)
        results = []
        if busy:
            stack.enter_context(busy_core())
            results.append(compare(workers, "decode", n_decode, repeats, _BUSY_LIMIT_SECONDS))
        else:
            if n_prompt:
                results.append(compare(workers, "prefill", n_prompt, repeats))
            if n_decode:
                results += [compare(workers, "decode", n_decode, repeats, batch=batch) for batch in batches]
        return {
            "model": sides[0].model,
            "models": {side.label: side.model for side in sides},
            "threads": threads,
            "busy": busy,
            "cores": os.cpu_count(),
            "builds": {worker.label: worker.build for worker in workers},
            "idle_cpu_seconds": {worker.label: worker.idle_cpu_seconds for worker in workers},
            "seconds": time.perf_counter() - start,
            "results": results,
        }


def report(compared: dict) -> str:
    """The comparison as lines for people."""
    busy = ", one core kept busy by another process" if compared["busy"] else ""
    names = list(dict.fromkeys(Path(model).name for model in compared["models"].values()))
    lines = [f"{' and '.join(names)}, {compared['threads']} threads{busy}"]
    for result in compared["results"]:
        batch = f" x{result['batch']}" if result["batch"] > 1 else "   "
        speeds = "   ".join(f"{label} {speed:9.1f}" for label, speed in result["tokens_per_second"].items())
        spread = f"{result['ratio_min']:.2f} to {result['ratio_max']:.2f}"
        ratio = f"ratio {result['ratio_median']:.2f} ({spread})"
        lines.append(f"  {result['work']:>7} {result['tokens']:>5}{batch}   {speeds} tokens/s   {ratio}")
    lines += [f"  {label}: {build}" for label, build in compared["builds"].items()]
    idle = ", ".join(f"{label} {seconds:.2f} s" for label, seconds in compared["idle_cpu_seconds"].items())
    lines.append(f"  processor time used while waiting: {idle} of {compared['seconds']:.0f} s")
    return "\n".join(lines)


def two_sides(model: str, sparsity: str, peer: str, peer_model: str | None) -> list[Side]:
    """pyinfer, and what it is compared with: another engine, or itself without skipping anything."""
    label = peer if peer != ENGINES[0] else f"{peer} dense"
    return [
        Side(ENGINES[0], ENGINES[0], model, sparsity),
        Side(label, peer, peer_model or model, "dense"),
    ]


@click.command()
@click.option(
    "-m", "--model", "models", required=True, multiple=True, type=click.Path(exists=True, dir_okay=False)
)
@click.option("--sparsity", default="auto", show_default=True, help="Of pyinfer, as in pyinfer-generate.")
@click.option("--peer", type=click.Choice(ENGINES), default=ENGINES[1], show_default=True)
@click.option(
    "--peer-model", type=click.Path(exists=True, dir_okay=False), help="File of the peer.  [the same]"
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("-p", "n_prompt", type=click.IntRange(0), default=512, show_default=True, help="Prompt tokens.")
@click.option("-n", "n_decode", type=click.IntRange(0), default=64, show_default=True, help="Decode steps.")
@click.option("-r", "repeats", type=click.IntRange(1), default=5, show_default=True, help="Pairs of runs.")
@click.option(
    "--batch",
    "batches",
    multiple=True,
    type=click.IntRange(1),
    default=(1,),
    show_default=True,
    help="Sequences decoded together, with --peer pyinfer; may be given several times.",
)
@click.option("--busy", is_flag=True, help="Decode only, while another process keeps one core busy.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per model.")
def main(
    models: tuple[str, ...], sparsity: str, peer: str, peer_model: str | None, as_json: bool, **options
) -> None:
    """Compare pyinfer with llama.cpp, or sparse with dense."""
    if max(options["batches"]) > 1 and peer != ENGINES[0]:
        raise click.UsageError(f"--batch above 1 needs --peer {ENGINES[0]}")
    if not (options["n_prompt"] or options["n_decode"]) or (options["busy"] and not options["n_decode"]):
        raise click.UsageError("nothing to measure: give -p or -n above 0")
    for model in models:
        try:
            compared = versus(two_sides(model, sparsity, peer, peer_model), **options)
        except PyInferError as error:
            raise click.ClickException(str(error)) from error
        click.echo(json.dumps(compared) if as_json else report(compared))


if __name__ == "__main__":
    main()
