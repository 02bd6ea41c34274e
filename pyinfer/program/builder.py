"""The op vocabulary as a family writes it; every shape is checked here, once, against the file.

Source: the vocabulary follows ggml's graph functions and the llama.cpp tensor names.
"""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from typing import Any

import numpy as np

from pyinfer import names
from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.gguf_file import GGUFFile, Tensor
from pyinfer.program.program import Cache, Op, Program, Value
from pyinfer.program.rope import Rope
from pyinfer.program.sparsity import DENSE, PREDICTED, FFNPlan, LayerPlan

ACTIVATIONS = ("silu", "gelu", "gelu_erf", "relu", "relu2", "fatrelu", "drelu")
BIASED = ("linear", "linear_t", "linear_at", "layer_norm")  # operations that add the bias of their weight
BY_NEURON = (names.FFN_GATE, names.FFN_UP, names.FFN_DOWN_T, names.FC2)  # a row is a neuron's
HOT, COLD = "hot", "cold"
MOST_COLUMNS = 1 << 24  # a row of activations stays below 64 MiB


class Weight:
    """A matrix or vector of the file with its bias, if it has one."""

    def __init__(self, file: GGUFFile, name: str, block: int | None = None) -> None:
        full = names.weight(name, block)
        if full not in file.tensors:
            raise FormatError(
                f"{file.path}: tensor {full} is missing, architecture {file.architecture} needs it"
            )
        self.tensor = file.tensors[full]
        self.bias = file.tensors.get(names.bias(name, block))

    def part(self, label: str, index: np.ndarray) -> Weight:
        """These rows, and their part of the bias."""
        found = copy(self)
        found.tensor = self.tensor.part(label, index)
        found.bias = self.bias.part(label, index) if self.bias else None
        return found


class Weights:
    """The tensors of a model, or of one block, by their names on disk: `w.token_embd`,
    `w.layers[3].attn_q`.
    """

    def __init__(
        self, file: GGUFFile, block: int | None = None, label: str = "", index: np.ndarray | None = None
    ) -> None:
        self._file, self.block = file, block
        self._label, self._index = label, index

    def __getattr__(self, name: str) -> Weight:
        found = Weight(self._file, name, self.block)
        if self._index is None or name not in BY_NEURON:
            return found
        part = found.part(self._label, self._index)
        if name == names.FFN_DOWN_T:
            part.bias = found.bias  # which is no neuron's
        return part

    def part(self, label: str, index: np.ndarray) -> Weights:
        """The same block with these neurons only."""
        return Weights(self._file, self.block, label, index)

    def has(self, name: str) -> bool:
        return names.weight(name, self.block) in self._file.tensors

    def layers(self, count: int) -> list[Weights]:
        return [Weights(self._file, block) for block in range(count)]


class Builder:
    """Collects operations; see `pyinfer.program.program.Op` for what each means."""

    def __init__(self, file: GGUFFile, plan: FFNPlan | None = None) -> None:
        self._file, self._plan = file, plan or FFNPlan()
        self._ops: list[Op] = []
        self._values = 0
        self._cache: Cache | None = None
        self._most_positions: int | None = None

    def _emit(
        self,
        name: str,
        inputs: tuple[Value, ...],
        width: int | None,
        weight: Weight | None = None,
        **params: Any,
    ) -> Value:
        output = None
        if width is not None:
            output = Value(self._values, width)
            self._values += 1
        tensor = weight.tensor if weight else None
        bias = weight.bias if weight and name in BIASED else None
        self._ops.append(Op(name, inputs, output, tensor, bias, params))
        return output  # type: ignore[return-value]  # only `store` has none, and its method drops it

    def _check(self, tensor: Tensor, expected: tuple[int, ...], what: str) -> None:
        found = tensor.shape
        while len(found) > len(expected) and found[-1] == 1:
            found = found[:-1]
        if found != expected:
            raise FormatError(
                f"{self._file.path}: {tensor.name} has shape {list(tensor.shape)}, "
                f"expected {list(expected)} ({what})"
            )

    def _vector(self, tensor: Tensor | None, length: int, what: str) -> None:
        if tensor is None:
            return
        self._check(tensor, (length,), what)
        if tensor.type not in (names.GGMLType.F32, names.GGMLType.F16, names.GGMLType.BF16):
            raise UnsupportedError(
                f"{self._file.path}: {tensor.name} is {tensor.type.name}, vectors are F32, F16 or BF16"
            )

    def embed(self, weight: Weight, width: int, scale: float = 1.0) -> Value:
        vocabulary = weight.tensor.rows
        self._check(weight.tensor, (width, vocabulary), "embedding_length, vocabulary")
        return self._emit("embed", (), width, weight, scale=scale)

    def rms_norm(self, x: Value, weight: Weight, epsilon: float, heads: int = 1) -> Value:
        self._vector(weight.tensor, x.width // heads, "one number per element")
        return self._emit("rms_norm", (x,), x.width, weight, epsilon=epsilon, heads=heads)

    def linear(self, x: Value, weight: Weight, width: int) -> Value:
        """`width` is the number of outputs that the family expects."""
        self._check(weight.tensor, (x.width, width), "inputs, outputs")
        if x.width > MOST_COLUMNS:
            raise UnsupportedError(
                f"{self._file.path}: {weight.tensor.name} has {x.width} columns, "
                f"at most {MOST_COLUMNS} are supported"
            )
        self._vector(weight.bias, width, "one bias per output")
        return self._emit("linear", (x,), width, weight)

    def linear_t(self, x: Value, weight: Weight, width: int, before: Value | None = None) -> Value:
        """As `linear`, for a weight that is kept neuron by neuron: a row of `width` columns for every element
        of x, and before those for every element of `before`.
        """
        inputs = (before, x) if before else (x,)
        self._check(weight.tensor, (width, sum(value.width for value in inputs)), "outputs, inputs")
        self._vector(weight.bias, width, "one bias per output")
        for value in inputs:
            if value.width % 32:
                raise UnsupportedError(
                    f"{self._file.path}: {weight.tensor.name} has {value.width} rows, not a multiple of 32"
                )
        return self._emit("linear_t", inputs, width, weight)

    def linear_at(
        self, x: Value, mask: Value, weight: Weight, *, times: bool, thresholds: Any = None
    ) -> Value:
        """As `linear`, but only the outputs that `mask` (of the same width) asks for; the others are 0.

        Asked for is where mask is not 0, or where it reaches `thresholds`; `times`: outputs times mask.
        """
        self._check(weight.tensor, (x.width, mask.width), "inputs, outputs")
        self._vector(weight.bias, mask.width, "one bias per output")
        assert times == (thresholds is None), "a guess is no factor, and only a guess has thresholds"
        return self._emit("linear_at", (x, mask), mask.width, weight, times=times, thresholds=thresholds)

    def keep(self, x: Value, least: float) -> Value:
        """x where its magnitude reaches `least`, else 0."""
        return self._emit("keep", (x,), x.width, least=least)

    def observe(self, what: str, x: Value, layer: int | None) -> None:
        self._emit("observe", (x,), None, what=what, layer=layer)

    def layer_norm(self, x: Value, weight: Weight, epsilon: float) -> Value:
        self._vector(weight.tensor, x.width, "one number per element")
        self._vector(weight.bias, x.width, "one bias per element")
        return self._emit("layer_norm", (x,), x.width, weight, epsilon=epsilon)

    def embed_position(self, x: Value, weight: Weight, offset: int) -> Value:
        """x plus a learned vector per position; the matrix bounds the context."""
        positions = weight.tensor.rows - offset
        self._check(weight.tensor, (x.width, weight.tensor.rows), "embedding_length, positions")
        if positions < 1:
            raise FormatError(
                f"{self._file.path}: {weight.tensor.name} has {weight.tensor.rows} rows, "
                f"expected more than {offset}"
            )
        self._most_positions = positions
        return self._emit("embed_position", (x,), x.width, weight, offset=offset, scale=1.0)

    def slices(self, x: Value, *widths: int) -> tuple[Value, ...]:
        """Consecutive parts of a row; widths are multiples of 16."""
        starts = [sum(widths[:n]) for n in range(len(widths))]
        if sum(widths) != x.width or any(width % 16 for width in widths):
            raise UnsupportedError(
                f"{self._file.path}: rows of {x.width} cannot be cut into {list(widths)}, multiples of 16"
            )
        return tuple(self._emit("slices", (x,), width, start=start) for start, width in zip(starts, widths))

    def scale(self, x: Value, factor: float) -> Value:
        return self._emit("scale", (x,), x.width, factor=factor)

    def activate(self, activation: str, x: Value) -> Value:
        return self._emit("activate", (x,), x.width, activation=self._activation(activation, "activate"))

    def _activation(self, name: str, use: str) -> str:
        kind, _, threshold = name.partition(":")
        number = threshold.replace(".", "", 1).isdecimal()
        known = kind in ACTIVATIONS and (kind == "fatrelu") == bool(threshold) and (not threshold or number)
        if not known or (use == "activate" and kind == "drelu"):
            raise UnsupportedError(
                f"{self._file.path}: activation {name!r} is not supported; known are {', '.join(ACTIVATIONS)}"
            )
        return name

    def rope(self, x: Value, rope: Rope, heads: int) -> Value:
        return self._emit("rope", (x,), x.width, rope=rope, heads=heads)

    def attend(
        self,
        layer: int,
        q: Value,
        k: Value,
        v: Value,
        *,
        heads: int,
        kv_heads: int,
        scale: float,
        window: int = 0,
    ) -> Value:
        """Store k and v of this step, then attend to everything stored; window > 0 limits the view."""
        head_size = q.width // heads
        if self._cache is not None and (self._cache.kv_heads, self._cache.head_size) != (kv_heads, head_size):
            raise UnsupportedError(
                f"{self._file.path}: layer {layer} has another KV head shape than the layers before"
            )
        self._cache = Cache(max(layer + 1, self._cache.layers if self._cache else 0), kv_heads, head_size)
        self._emit("store", (k, v), None, layer=layer, kv_heads=kv_heads)
        params = {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_size": head_size,
            "scale": scale,
            "window": window,
        }
        return self._emit("attend", (q,), q.width, layer=layer, **params)

    def gate(self, activation: str, g: Value, u: Value) -> Value:
        return self._emit("gate", (g, u), g.width, activation=self._activation(activation, "gate"))

    def add(self, a: Value, b: Value) -> Value:
        return self._emit("add", (a, b), a.width)

    def ffn(self, x: Value, layer: Weights, activation: str, width: int, raw: Value | None = None) -> Value:
        """A feed-forward layer: down(activation(gate x) * up x), or without a gate down(activation(up x)).

        Dense, exact or predicted: that is decided in this one method, by the plan. down may be kept neuron by
        neuron (ffn_down_t). `raw` is the input before its norm, which some predictors read.
        """
        plan = self._plan.layer(layer.block)
        if len(plan.hot):
            return self._hot_and_cold(x, raw, layer, activation, plan)
        gated = layer.has(names.FFN_GATE)
        if plan.mode == PREDICTED:
            scores = self._scores(x, raw, layer, plan)
            return self._down(self._of_guess(x, scores, layer, activation, plan), layer, x.width)
        g = self.linear(x, layer.ffn_gate if gated else layer.ffn_up, width)
        if plan.mode == DENSE and gated:
            hidden = self.gate(activation, g, self.linear(x, layer.ffn_up, width))
        else:
            hidden = self._fired(x, g, layer, activation, plan)
            self._stats("used", hidden, layer)
        self._observe(layer, x, raw, g, hidden, activation)
        return self._down(hidden, layer, x.width)

    def _down(self, hidden: Value, layer: Weights, width: int) -> Value:
        if layer.has(names.FFN_DOWN_T):
            return self.linear_t(hidden, layer.ffn_down_t, width)
        return self.linear(hidden, layer.ffn_down, width)

    def _hot_and_cold(
        self, x: Value, raw: Value | None, layer: Weights, activation: str, plan: LayerPlan
    ) -> Value:
        """Hot neurons as a dense layer of their own, the others by prediction; what reads x stands together,
        so that it is one linear.
        """
        assert plan.thresholds is not None, "a plan with hot neurons has thresholds"
        neurons = len(plan.thresholds)
        for name in BY_NEURON:  # before they are cut: a part has the right shape in any case
            if layer.has(name):
                weight = getattr(layer, name)
                self._check(weight.tensor, (weight.tensor.columns, neurons), "columns, neurons")
                self._vector(weight.bias if name != names.FFN_DOWN_T else None, neurons, "one per neuron")
        cold = np.setdiff1d(np.arange(neurons), plan.hot)
        hot, rest = layer.part(HOT, plan.hot), layer.part(COLD, cold)
        both = layer.part(f"{HOT}, {COLD}", np.concatenate([plan.hot, cold]))
        gated = layer.has(names.FFN_GATE)
        first = self.linear(x, hot.ffn_gate if gated else hot.ffn_up, len(plan.hot))
        up = self.linear(x, hot.ffn_up, len(plan.hot)) if gated else None
        scores = self._scores(x, raw, rest, plan)
        hidden = self.gate(activation, first, up) if up else self.activate(activation, first)
        self._stats("hot", hidden, layer)
        plan = replace(plan, thresholds=plan.thresholds[cold])
        others = self._of_guess(x, scores, rest, activation, plan)
        return self.linear_t(others, both.ffn_down_t, x.width, before=hidden)

    def _of_guess(self, x: Value, scores: Value, layer: Weights, activation: str, plan: LayerPlan) -> Value:
        """What goes into down, from the neurons whose score reaches its threshold."""
        first = layer.ffn_gate if layer.has(names.FFN_GATE) else layer.ffn_up
        g = self.linear_at(x, scores, first, times=False, thresholds=plan.thresholds)
        self._stats("computed", g, layer)
        if self._plan.observe == "stats":  # what the layer would have used without a predictor
            every = np.full(scores.width, -np.inf, np.float32)
            whole = self.linear_at(x, scores, first, times=False, thresholds=every)
            self._stats("truth", self._fired(x, whole, layer, activation, plan), layer)
        hidden = self._fired(x, g, layer, activation, plan)
        self._stats("used", hidden, layer)
        return hidden

    def _fired(self, x: Value, g: Value, layer: Weights, activation: str, plan: LayerPlan) -> Value:
        """What goes into down: activation(g), with a gate times up for the neurons that are active."""
        active = self._active(plan, activation, g)
        return self._times_up(x, active, layer, activation) if layer.has(names.FFN_GATE) else active

    def _stats(self, what: str, x: Value, layer: Weights) -> None:
        if self._plan.observe == "stats":
            self.observe(what, x, layer.block)

    def _active(self, plan: LayerPlan, activation: str, g: Value) -> Value:
        """The activation alone; of dReLU the first half, as relu(g) * relu(u) is relu(relu(g) * u)."""
        active = self.activate("relu" if activation == "drelu" else activation, g)
        return self.keep(active, plan.keep) if plan.keep else active

    def _scores(self, x: Value, raw: Value | None, layer: Weights, plan: LayerPlan) -> Value:
        """What the layer's predictor says of every neuron."""
        source = raw if plan.input == "raw" else x
        if source is None:
            raise UnsupportedError(f"{self._file.path}: predictors of this family read the normed input")
        small = self.linear(source, layer.fc1, layer.fc1.tensor.rows)
        if plan.form == "relu":
            small = self.activate("relu", small)
        return self.linear(small, layer.fc2, layer.fc2.tensor.rows)

    def _times_up(self, x: Value, active: Value, layer: Weights, activation: str) -> Value:
        """active * (up x), of dReLU its second half, too, for neurons that are active."""
        hidden = self.linear_at(x, active, layer.ffn_up, times=True)
        return self.activate("relu", hidden) if activation == "drelu" else hidden

    def _observe(
        self, layer: Weights, x: Value, raw: Value | None, g: Value, hidden: Value, activation: str
    ) -> None:
        what = self._plan.observe
        if what == "fired":
            self.observe("fired", hidden, layer.block)
        elif what == "histogram":
            self.observe("histogram", self._active(LayerPlan(), activation, g), layer.block)
        elif what == "rows":
            for name, value in (("x", x), ("raw", raw), ("gate", g), ("hidden", hidden)):
                if value is not None:
                    self.observe(name, value, layer.block)

    def select(self, x: Value) -> Value:
        return self._emit("select", (x,), x.width)

    def finish(self, logits: Value) -> Program:
        if self._cache is None or self._ops[-1].output != logits or self._ops[-1].name != "linear":
            raise AssertionError(
                "a program attends at least once and ends with the linear that makes the logits"
            )
        return Program(tuple(self._ops), self._cache, logits.width, self._most_positions)
