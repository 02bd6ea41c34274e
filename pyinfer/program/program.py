"""A model as a flat list of operations over named values: what you see is what runs.

A family builds it once at load time (`pyinfer.program.builder`); three executors run it: `reference` (NumPy
float64, the definition), `cpu`, later `cuda`. It holds names and shapes, never weights.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pyinfer.gguf_file import Tensor


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
      linear_t(x; weight)               x @ weight (plus bias), for a weight that is kept row by row
      slices(x) start                   a part of the row
      rope(x) rope heads                every head rotated by the row's position
      store(k, v) layer kv_heads        write the row to the KV cache at its position
      attend(q) layer heads kv_heads head_size scale window
                                        softmax(q . k * scale) v over positions so far, or the last `window`
      activate(x) activation            activation(x)
      gate(g, u) activation             activation(g) * u
      add(a, b)                         a + b
      scale(x) factor                   x times a number
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
        shown = {key: value for key, value in self.params.items() if key != "rope"}
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
        linears = [op for op in self.ops if op.name in ("linear", "linear_t")]
        return list({op.weight.name: op.weight for op in linears if op.weight}.values())

    def __str__(self) -> str:
        return "\n".join(str(op) for op in self.ops)
