"""The same model, threads and lengths through pyinfer and through llama.cpp, taking turns in one run.

    python -m pyinfer_tools.versus -m MODEL [-m MODEL2] --threads 2 -p 512 -n 64 -r 5 [--json] [--busy]

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


class Worker:
    """One engine's process."""

    def __init__(self, engine: str, model: str, n_ctx: int, threads: int) -> None:
        command = [sys.executable, "-m", "pyinfer_tools.versus_worker", "--engine", engine, "-m", model]
        command += ["--ctx", str(n_ctx), "--threads", str(threads)]
        self.engine = engine
        self.idle_cpu_seconds = 0.0
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8"
        )
        try:
            self.build: str = self._answer()["build"]
        except BaseException:
            self.close()
            raise

    def speed(self, work: str, tokens: int, limit_seconds: float | None = None) -> float:
        """Tokens per second of one run; work is "prefill" or "decode"."""
        time.sleep(_PAUSE_SECONDS)
        request = {"do": work, "tokens": tokens, "limit_seconds": limit_seconds}
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
            raise WorkerError(f"the process of {self.engine} ended with status {self._process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.engine}: {answer['error']}")
        return answer


def compare(workers: list[Worker], work: str, tokens: int, repeats: int, limit: float | None = None) -> dict:
    """Speeds of both engines in turns, and the ratio of each pair."""
    for worker in workers:
        worker.speed(work, min(tokens, 8) if work == "decode" else tokens, limit)
    speeds: dict[str, list[float]] = {worker.engine: [] for worker in workers}
    for index in range(repeats):
        for worker in workers:
            speeds[worker.engine].append(worker.speed(work, tokens, limit))
        last = ", ".join(f"{engine} {runs[-1]:.1f}" for engine, runs in speeds.items())
        click.echo(f"{work} {tokens}, run {index + 1} of {repeats}: {last} tokens/s", err=True)
    ours, theirs = (speeds[engine] for engine in ENGINES)
    ratios = sorted(our / their for our, their in zip(ours, theirs))
    return {
        "work": work,
        "tokens": tokens,
        "tokens_per_second": {engine: median(runs) for engine, runs in speeds.items()},
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


def versus(model: str, threads: int, n_prompt: int, n_decode: int, repeats: int, busy: bool) -> dict:
    """All comparisons of one model."""
    n_ctx = max(n_prompt, n_decode)
    start = time.perf_counter()
    with contextlib.ExitStack() as stack:
        workers = []
        for engine in ENGINES:
            workers.append(Worker(engine, model, n_ctx, threads))
            stack.callback(workers[-1].close)
        results = []
        if busy:
            stack.enter_context(busy_core())
            results.append(compare(workers, "decode", n_decode, repeats, _BUSY_LIMIT_SECONDS))
        else:
            if n_prompt:
                results.append(compare(workers, "prefill", n_prompt, repeats))
            if n_decode:
                results.append(compare(workers, "decode", n_decode, repeats))
        return {
            "model": model,
            "threads": threads,
            "busy": busy,
            "cores": os.cpu_count(),
            "builds": {worker.engine: worker.build for worker in workers},
            "idle_cpu_seconds": {worker.engine: worker.idle_cpu_seconds for worker in workers},
            "seconds": time.perf_counter() - start,
            "results": results,
        }


def report(compared: dict) -> str:
    """The comparison as lines for people."""
    busy = ", one core kept busy by another process" if compared["busy"] else ""
    lines = [f"{Path(compared['model']).name}, {compared['threads']} threads{busy}"]
    for result in compared["results"]:
        ours, theirs = (result["tokens_per_second"][engine] for engine in ENGINES)
        speeds = f"pyinfer {ours:9.1f}   llama.cpp {theirs:9.1f} tokens/s"
        spread = f"{result['ratio_min']:.2f} to {result['ratio_max']:.2f}"
        ratio = f"ratio {result['ratio_median']:.2f} ({spread})"
        lines.append(f"  {result['work']:>7} {result['tokens']:>5}   {speeds}   {ratio}")
    lines += [f"  {build}" for build in compared["builds"].values()]
    idle = ", ".join(f"{engine} {seconds:.2f} s" for engine, seconds in compared["idle_cpu_seconds"].items())
    lines.append(f"  processor time used while waiting: {idle} of {compared['seconds']:.0f} s")
    return "\n".join(lines)


@click.command()
@click.option(
    "-m", "--model", "models", required=True, multiple=True, type=click.Path(exists=True, dir_okay=False)
)
@click.option("--threads", type=click.IntRange(1), default=2, show_default=True)
@click.option("-p", "n_prompt", type=click.IntRange(0), default=512, show_default=True, help="Prompt tokens.")
@click.option("-n", "n_decode", type=click.IntRange(1), default=64, show_default=True, help="Decode steps.")
@click.option("-r", "repeats", type=click.IntRange(1), default=5, show_default=True, help="Pairs of runs.")
@click.option("--busy", is_flag=True, help="Decode only, while another process keeps one core busy.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per model.")
def main(
    models: tuple[str, ...],
    threads: int,
    n_prompt: int,
    n_decode: int,
    repeats: int,
    busy: bool,
    as_json: bool,
) -> None:
    """Compare pyinfer with llama.cpp."""
    for model in models:
        try:
            compared = versus(model, threads, n_prompt, n_decode, repeats, busy)
        except PyInferError as error:
            raise click.ClickException(str(error)) from error
        click.echo(json.dumps(compared) if as_json else report(compared))


if __name__ == "__main__":
    main()
