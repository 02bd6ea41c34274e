"""Time feed-forward layers alone: all neurons against those that are active, in turns.

    python -m pyinfer_tools.bench_ffn --width 4096 --neurons 11008 --active 0.1

Gate, up and down are Q4_0 with random codes. Dense: all three in panels. Sparse: the rows of active neurons
(the same random ones in every layer, whose matrices are others), down kept neuron by neuron. Enough layers
stand behind each other that nothing of them stays in a cache.
"""

from __future__ import annotations

import statistics
import time
from types import SimpleNamespace

import click
import numpy as np

from pyinfer.cpu.executor import Executor
from pyinfer.cpu.weights import Weights
from pyinfer.gguf_file import Tensor
from pyinfer.jit.team import Team
from pyinfer.names import GGMLType
from pyinfer.program.program import Cache, Op, Program, Value
from pyinfer.runtime.loader import default_threads

BYTES_PER_WEIGHT = 18 / 32
STEPS = 4  # between two looks at the clock
LOGITS = 64


class _Layers:
    """Builds programs of feed-forward layers."""

    def __init__(self, width: int, neurons: int, rows: int, active: float, layers: int) -> None:
        self.width, self.neurons, self.layers = width, neurons, layers
        self._random = np.random.default_rng(0)
        self._x = self._random.standard_normal((rows, width))
        self._mask = (self._random.random((rows, neurons)) < active).astype(np.float32)
        self._blocks: dict[tuple[int, int], np.ndarray] = {}
        self._ops: list[Op] = []

    def _emit(self, name: str, inputs: tuple, width: int, weight: Tensor, **params) -> Value:
        output = Value(len(self._ops), width)
        self._ops.append(Op(name, inputs, output, weight, None, params))
        return output

    def _q4_0(self, name: str, rows: int, columns: int) -> Tensor:
        if (rows, columns) not in self._blocks:
            blocks = self._random.integers(0, 256, (rows * columns // 32, 18), np.uint8)
            blocks[:, :2] = np.full(len(blocks), 0.002, np.float16).view(np.uint8).reshape(-1, 2)
            self._blocks[rows, columns] = blocks.reshape(-1)
        return Tensor(name, (columns, rows), GGMLType.Q4_0, self._blocks[rows, columns])

    def _floats(self, name: str, array: np.ndarray) -> Tensor:
        array = np.ascontiguousarray(array, np.float32)
        return Tensor(name, array.shape[::-1], GGMLType.F32, array.view(np.uint8).reshape(-1))

    def program(self, sparse: bool) -> Program:
        self._ops, width, neurons = [], self.width, self.neurons
        x = self._emit("embed", (), width, self._floats("x", self._x), scale=1.0)
        mask = self._emit("embed", (), neurons, self._floats("mask", self._mask), scale=1.0)
        some = {"thresholds": np.full(neurons, 0.5, np.float32), "times": False}
        for layer in range(self.layers):
            gate, up = (self._q4_0(f"{name}{layer}", neurons, width) for name in ("gate", "up"))
            if sparse:
                self._emit("linear_at", (x, mask), neurons, gate, **some)
                # The mask stands for the gate's values, so that just the asked share goes on.
                a = self._emit("activate", (mask,), neurons, gate, activation="relu")
                h = self._emit("linear_at", (x, a), neurons, up, thresholds=None, times=True)
                y = self._emit("linear_t", (h,), width, self._q4_0(f"down{layer}", neurons, width))
            else:
                g, u = (self._emit("linear", (x,), neurons, each) for each in (gate, up))
                h = self._emit("gate", (g, u), neurons, gate, activation="relu")
                y = self._emit("linear", (h,), width, self._q4_0(f"down{layer}", width, neurons))
            norm = self._floats("norm", np.ones(width))
            x = self._emit("rms_norm", (y,), width, norm, epsilon=1e-5, heads=1)
        self._emit("linear", (x,), LOGITS, self._q4_0("output", LOGITS, width))
        return Program(tuple(self._ops), Cache(1, 1, 16), LOGITS)


def measure(
    width: int, neurons: int, active: float, rows: int, layers: int, threads: int, repeats: int
) -> dict[str, list[float]]:
    """Seconds per layer, of each repeat, dense and sparse."""
    team, made = Team(threads), _Layers(width, neurons, rows, active, layers)
    file = SimpleNamespace(path="benchmark", drop_pages=lambda tensor: None)
    steps = np.arange(rows), np.zeros(rows, int), np.arange(rows), [0]
    try:
        executors = {}
        for name in ("dense", "sparse"):
            program = made.program(name == "sparse")
            weights = Weights(program, file, team)  # type: ignore[arg-type]
            executors[name] = Executor(program, weights, team, 64, rows, rows)
        seconds: dict[str, list[float]] = {name: [] for name in executors}
        for repeat in range(repeats + 1):
            for name, executor in executors.items():
                executor.step(*steps)
                start = time.perf_counter()
                for _ in range(STEPS):
                    executor.step(*steps)
                if repeat:  # the first one compiles
                    seconds[name].append((time.perf_counter() - start) / STEPS / layers)
    finally:
        team.close()
    return seconds


@click.command()
@click.option("--width", type=click.IntRange(64), default=4096, show_default=True, help="Embedding length.")
@click.option("--neurons", type=click.IntRange(64), default=11008, show_default=True)
@click.option(
    "--active", type=click.FloatRange(0, 1), default=0.1, show_default=True, help="Share of neurons."
)
@click.option("--rows", type=click.IntRange(1), default=1, show_default=True, help="Tokens of a step.")
@click.option("--layers", type=click.IntRange(1), default=12, show_default=True)
@click.option("-t", "--threads", type=click.IntRange(1), help="[default: as many as may be used]")
@click.option("--repeats", type=click.IntRange(1), default=10, show_default=True)
def main(
    width: int, neurons: int, active: float, rows: int, layers: int, threads: int | None, repeats: int
) -> None:
    """Time feed-forward layers alone, all neurons against the active ones."""
    if width % 64 or neurons % 64:
        raise click.UsageError("--width and --neurons are multiples of 64")
    found = measure(width, neurons, active, rows, layers, threads or default_threads(), repeats)
    n_bytes = 3 * width * neurons * BYTES_PER_WEIGHT
    for name, share in (("dense", 1.0), ("sparse", active)):
        median = statistics.median(found[name])
        rate = f"  {n_bytes * share / median / 1e9:5.1f} GB/s" if rows == 1 else ""
        click.echo(f"{name:7s} {median * 1e6:9.1f} us a layer{rate}")
    ratios = sorted(dense / sparse for dense, sparse in zip(found["dense"], found["sparse"]))
    click.echo(f"ratio   {statistics.median(ratios):9.2f}  ({ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
