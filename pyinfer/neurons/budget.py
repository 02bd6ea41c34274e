"""The bytes of a model by purpose, and which of them a GPU's memory holds first.

Read for every token are the attention weights, the KV cache, the output head and the predictors: a byte of
them on the GPU is a byte less that the CPU reads, every time, which no neuron surpasses. So they come first,
and neurons get the rest. The order is that in which a step needs them, each part that still fits: scratch,
without which the GPU computes nothing; attention, norms and KV cache together, layer by layer, because keys
stay where attention reads them; the output head; predictors, layer by layer. A budget too small for all of
that is not wasted on the first part that does not fit.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pyinfer import names
from pyinfer.cpu.attention import element_bytes_of
from pyinfer.errors import InputError
from pyinfer.gguf_file import GGUFFile, Tensor
from pyinfer.models import build_program
from pyinfer.program.program import Program

SCRATCH, ATTENTION, KV_CACHE, OUTPUT, PREDICTORS, NEURONS = PURPOSES = (
    "scratch",
    "attention",
    "kv_cache",
    "output",
    "predictors",
    "neurons",
)
SCRATCH_ROWS = 512  # tokens of a prompt that are computed at once

_IN_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_NEURON = (names.FFN_GATE, names.FFN_UP, names.FFN_DOWN, names.FFN_DOWN_T)
MOST_CONTEXT = 1 << 31


@dataclass(frozen=True)
class ModelBytes:
    """n_neurons : of each layer;  n_ctx : tokens that the KV cache is for
    neuron : per layer, of one neuron: its rows of gate and up and its column of down, in the file's types
    attention : per layer, with norms and biases;  kv_cache, predictor : per layer;  output, scratch : in all
    """

    n_neurons: int
    n_ctx: int
    neuron: tuple[int, ...]
    attention: tuple[int, ...]
    kv_cache: tuple[int, ...]
    predictor: tuple[int, ...]
    output: int
    scratch: int

    @property
    def n_layers(self) -> int:
        return len(self.neuron)

    def parts(self) -> Iterator[tuple[str, dict[str, int]]]:
        """(name, bytes by purpose) of what may be resident, in the order of this page."""
        yield SCRATCH, {SCRATCH: self.scratch}
        for layer, (weights, cache) in enumerate(zip(self.attention, self.kv_cache)):
            yield f"blk.{layer}.{ATTENTION}", {ATTENTION: weights, KV_CACHE: cache}
        yield OUTPUT, {OUTPUT: self.output}
        for layer, n_bytes in enumerate(self.predictor):
            if n_bytes:
                yield f"blk.{layer}.{PREDICTORS}", {PREDICTORS: n_bytes}

    def resident(self, budget_bytes: int) -> tuple[tuple[str, ...], dict[str, int]]:
        """Names of the parts that a budget holds, and their bytes by purpose; nothing where scratch does not
        fit.
        """
        found: list[str] = []
        used: dict[str, int] = {}
        for name, part in self.parts():
            if sum(used.values()) + sum(part.values()) <= budget_bytes:
                found.append(name)
                for purpose, n_bytes in part.items():
                    used[purpose] = used.get(purpose, 0) + n_bytes
            elif name == SCRATCH:
                break
        return tuple(found), used


def model_bytes(file: GGUFFile, n_ctx: int, n_rows: int = SCRATCH_ROWS) -> ModelBytes:
    """The bytes of an open model for one sequence of `n_ctx` tokens.

    raises InputError for a context that is no positive number, and as `build_program` does
    """
    if not 1 <= n_ctx <= MOST_CONTEXT:
        raise InputError(f"the context is {n_ctx} tokens, expected 1 to {MOST_CONTEXT}")
    hp, program = build_program(file)
    n_layers, n_neurons = hp.block_count, hp.feed_forward_length
    in_layers = {"neuron": [0] * n_layers, "attention": [0] * n_layers, "predictor": [0] * n_layers}
    output = 0
    for tensor in _tensors(file, program):
        match = _IN_LAYER.fullmatch(tensor.name)
        if match is None:
            output += tensor.nbytes
            continue
        _, name, kind = match.groups()
        purpose = "neuron" if name in _NEURON and kind == "weight" else "attention"
        purpose = "predictor" if name in (names.FC1, names.FC2) else purpose
        in_layers[purpose][int(match[1])] += tensor.nbytes
    cache = program.cache
    element_bytes = element_bytes_of({each.name: each.type for each in program.weights()})
    return ModelBytes(
        n_neurons=n_neurons,
        n_ctx=n_ctx,
        neuron=tuple(-(-n_bytes // n_neurons) for n_bytes in in_layers["neuron"]),
        attention=tuple(in_layers["attention"]),
        kv_cache=(2 * cache.kv_heads * cache.head_size * n_ctx * element_bytes,) * n_layers,
        predictor=tuple(in_layers["predictor"]),
        output=output,
        scratch=scratch_bytes(program, min(n_rows, n_ctx)),
    )


def _tensors(file: GGUFFile, program: Program) -> list[Tensor]:
    """What a step reads, each once: the program's weights and the predictors. The embedding, of which a step
    reads a row per token, stays where it is, unless it makes the logits, too.
    """
    read = [op for op in program.ops if op.name not in ("embed", "embed_position")]
    found = {each.name: each for op in read for each in (op.weight, op.bias) if each is not None}
    for layer in range(program.cache.layers):
        for name in (names.FC1, names.FC2):
            for full in (names.weight(name, layer), names.bias(name, layer)):
                if full in file.tensors:
                    found[full] = file.tensors[full]
    return list(found.values())


def scratch_bytes(program: Program, n_rows: int) -> int:
    """The most bytes of float32 values that a step of `n_rows` tokens holds at once, one of them wanted."""
    last = {value.index: at for at, op in enumerate(program.ops) for value in op.inputs}
    sizes: dict[int, int] = {}
    most = 0
    for at, op in enumerate(program.ops):
        if op.name == "select":
            n_rows = 1
        if op.output is not None:
            sizes[op.output.index] = 4 * n_rows * op.output.width
        most = max(most, sum(sizes.values()))
        for value in op.inputs:
            if last[value.index] == at:
                sizes.pop(value.index, None)
    return most
