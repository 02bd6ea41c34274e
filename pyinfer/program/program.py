"""A model as a flat list of operations over named values: what you see is what runs.

A family builds it once at load time (`pyinfer.program.builder`); three executors run it: `reference` (NumPy
float64, the definition), `cpu`, later `cuda`. It holds names and shapes, never weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from pyinfer.gguf_file import Tensor
from pyinfer.program.sparsity import STATS

LINEARS = ("linear", "linear_t", "linear_at")
NEURON_MAJOR = ("linear_t", "linear_at")  # read rows of their weight one by one


@dataclass(frozen=True)
class Value:
    """float32 [rows, width], one row per token of the step (or per wanted row, behind `select`)."""

    index: int
    width: int

    def __str__(self) -> str:
        return f"%{self.index}"


@dataclass(frozen=True)
class Op:
    """One operation: name, inputs, one output (None for `store`), weights, and what else it needs.

    The vocabulary, with x a row:
      embed(; weight) scale             the token's row of weight, times scale
      embed_position(x; weight) offset  x plus the row of weight at the position + offset
      rms_norm(x; weight) epsilon heads     x / rms(x) * weight, for each of `heads` equal parts of the row
      layer_norm(x; weight) epsilon     (x - mean) / deviation * weight + bias (if the weight has one)
      linear(x; weight)                 weight @ x + bias (if the weight has one)
      linear_t(x, ..; weight)           x @ weight (plus bias), for a weight that is kept row by row; x may
                                        be two values, one behind the other
      linear_at(x, m; weight) times thresholds
                                        weight @ x + bias where m is not 0 (or reaches its threshold), else 0;
                                        times m. A guess (with thresholds) may be ignored where all is cheaper
      linear_rows(x; weight)            as linear, for a weight that is kept row by row: made of a guess by
                                        `Program.without_guesses`
      slices(x) start                   a part of the row
      rope(x) rope heads                every head rotated by the row's position
      store(k, v) layer kv_heads        write the row to the KV cache at its position
      attend(q) layer heads kv_heads head_size scale window
                                        softmax(q . k * scale) v over positions so far, or the last `window`
      activate(x) activation            activation(x)
      gate(g, u) activation             activation(g) * u
      add(a, b)                         a + b
      scale(x) factor                   x times a number
      keep(x) least                     x where |x| >= least, else 0
      observe(x) what layer             nothing; the executor counts or keeps x
      select(x)                         only the rows whose logits are wanted

    Activations: silu, gelu (tanh form), gelu_erf, relu, relu2 (its square), fatrelu:T (x where x > T, else
    0), and as a gate drelu (relu(g) * relu(u)).
    """

    name: str
    inputs: tuple[Value, ...]
    output: Value | None
    weight: Tensor | None = None
    bias: Tensor | None = None
    params: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = ", ".join([str(value) for value in self.inputs] + ([self.weight.name] if self.weight else []))
        bias = f" + {self.bias.name}" if self.bias else ""
        shown = {key: value for key, value in self.params.items() if key not in ("rope", "thresholds")}
        params = "".join(
            f" {key}={value:g}" if isinstance(value, float) else f" {key}={value}"
            for key, value in shown.items()
        )
        left = f"{self.output}[{self.output.width}] = " if self.output else ""
        return f"{left}{self.name}({given}){bias}{params}"


@dataclass(frozen=True)
class Cache:
    """Shape of the KV cache that a program needs: per layer `kv_heads` keys and values of `head_size`."""

    layers: int
    kv_heads: int
    head_size: int


@dataclass(frozen=True)
class Program:
    """All operations in order; the last one's output are the logits [wanted rows, vocabulary]."""

    ops: tuple[Op, ...]
    cache: Cache
    vocab_size: int
    most_positions: int | None = None  # of learned positions

    def weights(self) -> list[Tensor]:
        """Matrices in the order in which the program reads them, each once."""
        linears = [op for op in self.ops if op.name in LINEARS]
        return list({op.weight.name: op.weight for op in linears if op.weight}.values())

    def without_guesses(self) -> Program:
        """The program with all of every `linear_at` that has thresholds, and without what only guessed."""
        kept: list[Op] = []
        needed: set[Value] = set()
        for op in reversed(self.ops):
            if op.output is not None and op.output not in needed and op is not self.ops[-1]:
                continue
            if op.params.get("what") in STATS:
                continue  # they count what was skipped
            if op.name == "linear_at" and op.params["thresholds"] is not None:
                op = replace(op, name="linear_rows", inputs=op.inputs[:1])
            needed.update(op.inputs)
            kept.append(op)
        return replace(self, ops=tuple(reversed(kept)))

    def __str__(self) -> str:
        return "\n".join(str(op) for op in self.ops)
