"""One engine in a process of its own: reads requests as lines of JSON, answers each with one line.

Started by `pyinfer_tools.versus`.
Requests: {"do": "prefill" | "decode", "tokens": n, "limit_seconds": s | null, "batch": sequences in a step}.
Answers: {"tokens": done, of all sequences, "seconds": s, "idle_cpu_seconds": processor time used since the
last answer}.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator

import click

from pyinfer.errors import PyInferError
from pyinfer_tools import llama_cpp
from pyinfer_tools.engine import Engine, open_session

ENGINES = ("pyinfer", "llama.cpp")


@contextlib.contextmanager
def _open(
    engine: str, model: str, n_ctx: int, threads: int, sparsity: str, most_batch: int
) -> Iterator[tuple[object, str]]:
    """The engine and a line about its build."""
    if engine == "llama.cpp":
        with llama_cpp.Peer(model, n_ctx, threads) as peer:
            yield peer, f"llama-cpp-python {llama_cpp.version()}: {llama_cpp.system_info()}"
    else:
        from pyinfer import __version__

        with open_session(model, n_ctx, threads, most_batch, sparsity) as (loaded, session):
            modes = ", ".join(sorted(loaded.plan.modes))
            yield Engine(session), f"pyinfer {__version__}, {session.n_threads} threads, {modes}"


def _serve(engine, build: str) -> None:
    _answer({"build": build})
    idle_since = time.process_time()
    for line in sys.stdin:
        idle = time.process_time() - idle_since
        request = json.loads(line)
        done, limit = request["tokens"], request.get("limit_seconds") or math.inf
        batch = request.get("batch") or 1
        if request["do"] == "prefill":
            seconds = engine.prefill_run(done)
        elif batch > 1:
            done, seconds = engine.decode_run(done, limit, batch)
            done *= batch
        else:
            done, seconds = engine.decode_run(done, limit)
        _answer({"tokens": done, "seconds": seconds, "idle_cpu_seconds": idle})
        idle_since = time.process_time()


def _answer(answer: dict) -> None:
    sys.stdout.write(json.dumps(answer) + "\n")
    sys.stdout.flush()


@click.command()
@click.option("--engine", type=click.Choice(ENGINES), required=True)
@click.option("-m", "--model", required=True)
@click.option("--ctx", type=int, required=True)
@click.option("--threads", type=int, required=True)
@click.option("--sparsity", default="auto", help="Of pyinfer.")
@click.option("--most-batch", type=int, default=1, help="Sequences that steps may have, of pyinfer.")
def main(engine: str, model: str, ctx: int, threads: int, sparsity: str, most_batch: int) -> None:
    """Serve one engine until stdin ends."""
    try:
        with _open(engine, model, ctx, threads, sparsity, most_batch) as (opened, build):
            _serve(opened, build)
    except PyInferError as error:
        _answer({"error": str(error)})


if __name__ == "__main__":
    main()
