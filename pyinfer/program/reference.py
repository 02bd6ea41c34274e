"""The definition: a program run with NumPy in float64, one operation after the other, nothing fused, nothing
fast.

Other executors are compared with this one. It shares no code with them; how tensors become numbers is given
by the caller.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from pyinfer.gguf_file import Tensor
from pyinfer.program.program import Op, Program

ACTIVATIONS = {
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_erf": lambda x: 0.5 * x * (1 + np.vectorize(math.erf)(x / np.sqrt(2))),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.maximum(x, 0),
}


class Reference:
    """Runs steps of (token, position, sequence) rows; `dequantize(tensor)` gives float64 [rows, columns] or
    [n].
    """

    def __init__(self, program: Program, dequantize: Callable[[Tensor], np.ndarray]) -> None:
        self.program = program
        self._dequantize = dequantize
        self._arrays: dict[str, np.ndarray] = {}
        self._cache: dict[tuple, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
        self.guesses = True  # whether predictions are followed; executors ignore them in steps of many rows
        self.observed: dict[tuple[str, int], list[np.ndarray]] = {}

    def _array(self, tensor: Tensor) -> np.ndarray:
        if tensor.name not in self._arrays:
            self._arrays[tensor.name] = self._dequantize(tensor).astype(np.float64)
        return self._arrays[tensor.name]

    def step(self, tokens, positions, sequences, wanted) -> np.ndarray:
        """Logits float64 [wanted, vocabulary]."""
        values: dict[int, np.ndarray] = {}
        rows = (np.asarray(tokens), np.asarray(positions), np.asarray(sequences), np.asarray(wanted, int))
        result = np.empty((0, self.program.vocab_size))
        for op in self.program.ops:
            result = getattr(self, f"_{op.name}")(op, rows, *(values[value.index] for value in op.inputs))
            if op.output is not None:
                values[op.output.index] = result
        return result

    def _embed(self, op: Op, rows) -> np.ndarray:
        return self._array(op.weight)[rows[0]] * op.params["scale"]

    def _rms_norm(self, op: Op, rows, x) -> np.ndarray:
        parts = x.reshape(len(x), op.params["heads"], -1)
        rms = np.sqrt((parts**2).mean(2, keepdims=True) + op.params["epsilon"])
        return (parts / rms * self._array(op.weight)).reshape(x.shape)

    def _linear(self, op: Op, rows, x) -> np.ndarray:
        return x @ self._array(op.weight).T + (self._array(op.bias) if op.bias else 0)

    def _rope(self, op: Op, rows, x) -> np.ndarray:
        rope = op.params["rope"]
        table = rope.table(rows[1])[:, None]
        cos, sin = table[..., 0], table[..., 1]
        half = rope.dimension_count // 2
        heads = x.reshape(len(x), op.params["heads"], -1)
        out = heads.copy()
        first, second = (
            (slice(0, half), slice(half, 2 * half))
            if rope.neox
            else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
        )
        out[..., first] = heads[..., first] * cos - heads[..., second] * sin
        out[..., second] = heads[..., second] * cos + heads[..., first] * sin
        return out.reshape(x.shape)

    def _store(self, op: Op, rows, k, v) -> None:
        shape = (op.params["kv_heads"], -1)
        for row, (position, sequence) in enumerate(zip(rows[1], rows[2])):
            stored = self._cache.setdefault((op.params["layer"], int(sequence)), {})
            stored[int(position)] = k[row].reshape(shape), v[row].reshape(shape)

    def _attend(self, op: Op, rows, q) -> np.ndarray:
        heads, kv_heads, window = op.params["heads"], op.params["kv_heads"], op.params["window"]
        out = np.empty_like(q).reshape(len(q), heads, -1)
        for row, (position, sequence) in enumerate(zip(rows[1], rows[2])):
            stored = self._cache[op.params["layer"], int(sequence)]
            seen = range(max(0, position - window + 1) if window else 0, position + 1)
            keys, values = (
                np.stack([stored[p][part] for p in seen], 1).repeat(heads // kv_heads, 0) for part in (0, 1)
            )
            scores = np.einsum("hc,hsc->hs", q[row].reshape(heads, -1), keys) * op.params["scale"]
            weights = np.exp(scores - scores.max(1, keepdims=True))
            out[row] = np.einsum("hs,hsc->hc", weights / weights.sum(1, keepdims=True), values)
        return out.reshape(q.shape)

    def _embed_position(self, op: Op, rows, x) -> np.ndarray:
        return x + self._array(op.weight)[rows[1] + op.params["offset"]]

    def _layer_norm(self, op: Op, rows, x) -> np.ndarray:
        centred = x - x.mean(1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(1, keepdims=True) + op.params["epsilon"])
        return centred / deviation * self._array(op.weight) + (self._array(op.bias) if op.bias else 0)

    def _linear_t(self, op: Op, rows, *inputs) -> np.ndarray:
        x = np.concatenate(inputs, axis=1)
        return x @ self._array(op.weight) + (self._array(op.bias) if op.bias else 0)

    def _linear_at(self, op: Op, rows, x, mask) -> np.ndarray:
        y = self._linear(op, rows, x)
        thresholds = op.params["thresholds"]
        if thresholds is not None and not self.guesses:
            return y
        active = mask != 0 if thresholds is None else mask >= thresholds
        return np.where(active, y * mask if op.params["times"] else y, 0)

    def _linear_rows(self, op: Op, rows, x) -> np.ndarray:
        return self._linear(op, rows, x)

    def _keep(self, op: Op, rows, x) -> np.ndarray:
        return np.where(np.abs(x) < op.params["least"], 0, x)

    def _observe(self, op: Op, rows, x) -> None:
        self.observed.setdefault((op.params["what"], op.params["layer"]), []).append(x)

    def _slices(self, op: Op, rows, x) -> np.ndarray:
        return x[:, op.params["start"] : op.params["start"] + op.output.width]

    def _scale(self, op: Op, rows, x) -> np.ndarray:
        return x * op.params["factor"]

    def _activate(self, op: Op, rows, x) -> np.ndarray:
        name, _, threshold = op.params["activation"].partition(":")
        return np.where(x > float(threshold), x, 0) if threshold else ACTIVATIONS[name](x)

    def _gate(self, op: Op, rows, g, u) -> np.ndarray:
        if op.params["activation"] == "drelu":
            return np.maximum(g, 0) * np.maximum(u, 0)
        return self._activate(op, rows, g) * u

    def _add(self, op: Op, rows, a, b) -> np.ndarray:
        return a + b

    def _select(self, op: Op, rows, x) -> np.ndarray:
        return x[rows[3]]
