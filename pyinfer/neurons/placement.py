"""A placement: which neurons a GPU keeps, what else is resident there, and what the plan is worth.

It is made for a budget of GPU memory from a profile's counts, and stored in the section of the file. Where
there is no GPU, neurons that fire for at least half of the tokens are hot: they are computed always, side by
side, because predicting them would cost more than it saves.

Source: Song et al. 2024 (PowerInfer), section 6.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from pyinfer.errors import FormatError, InputError
from pyinfer.neurons.budget import ATTENTION, MOST_CONTEXT, NEURONS, OUTPUT, PREDICTORS, PURPOSES, ModelBytes
from pyinfer.neurons.hardware import Hardware, hardware_from_dict
from pyinfer.neurons.solver import GROUP, Problem, solve
from pyinfer.progress import format_amount
from pyinfer.section import Entry

ON_GPU, ON_CPU = "gpu", "cpu"
OFTEN = 0.5  # of all tokens: neurons that fire so often need no prediction
PANEL_NEURONS = 16
_MOST_NAME = 100
_NUMBERS = ("budget_bytes", "n_ctx", "objective", "greedy_objective", "bound", "total")


@dataclass(frozen=True, eq=False)
class Placement:
    """hot : bool [L, F];  processor : of the hot neurons, gpu or cpu;  budget_bytes : it was made for
    resident : other parts on the GPU (names of `ModelBytes.parts`);  n_bytes : of the GPU, by purpose
    n_ctx : the context in n_bytes;  objective : counts of the hot neurons, of `total` in the profile
    greedy_objective : of the greedy plan beside it;  bound : no placement has more
    solver : exact, mip, greedy, or share (on a CPU);  hardware : it was made for
    """

    hot: np.ndarray
    processor: str
    budget_bytes: int
    n_ctx: int
    objective: int
    greedy_objective: int
    bound: int
    total: int
    solver: str
    resident: tuple[str, ...] = ()
    n_bytes: dict[str, int] = field(default_factory=dict)
    hardware: Hardware | None = None

    @property
    def gap(self) -> float:
        """What the objective may lack, as a part of the bound."""
        return (self.bound - self.objective) / self.bound if self.bound else 0.0

    @property
    def hot_neurons(self) -> np.ndarray:
        """int64 [L]."""
        return self.hot.sum(1)

    def needed_bytes(self, model: ModelBytes) -> int | None:
        """GPU memory for it with this model and context; None when it names parts that the model lacks."""
        parts = {name: sum(each.values()) for name, each in model.parts()}
        if not set(self.resident) <= set(parts):
            return None
        return sum(parts[name] for name in self.resident) + _neuron_bytes(self.hot, model)

    def to_entry(self) -> Entry:
        """As the section holds it: hot neurons as bits, the first one the highest bit of its byte."""
        info = {
            "neurons": self.hot.shape[1],
            "processor": self.processor,
            "budget_bytes": self.budget_bytes,
            "n_ctx": self.n_ctx,
            "objective": self.objective,
            "greedy_objective": self.greedy_objective,
            "bound": self.bound,
            "total": self.total,
            "solver": self.solver,
            "resident": list(self.resident),
            "bytes": self.n_bytes,
            "hardware": self.hardware.to_dict() if self.hardware else None,
        }
        return Entry(info, {"hot": np.packbits(self.hot, axis=1)})

    @classmethod
    def from_entry(cls, entry: Entry, n_layers: int, n_neurons: int) -> Placement:
        """The placement of an entry of a model's section; raises FormatError for one that does not fit it."""
        info = entry.info
        if info.get("neurons") != n_neurons:
            raise FormatError(
                f"placement: has {str(info.get('neurons'))[:20]} neurons a layer, the model has {n_neurons}"
            )
        bits = entry.arrays.get("hot")
        shape = (n_layers, -(-n_neurons // 8))
        if bits is None or bits.dtype != np.uint8 or bits.shape != shape:
            found = "none" if bits is None else f"{bits.dtype} {list(bits.shape)}"
            raise FormatError(f"placement: hot neurons are {found}, expected uint8 {list(shape)}")
        if np.unpackbits(bits, axis=1)[:, n_neurons:].any():
            raise FormatError("placement: bits behind the last neuron are set")
        hardware = info.get("hardware")
        numbers = {name: _count(info, name) for name in _NUMBERS}
        if numbers["n_ctx"] > MOST_CONTEXT:
            raise FormatError(f"placement: n_ctx is {numbers['n_ctx']}, expected up to {MOST_CONTEXT}")
        most = min(numbers["bound"], numbers["total"])
        if max(numbers["objective"], numbers["greedy_objective"]) > most:
            raise FormatError("placement: an objective is above its bound or above all counts")
        resident = info.get("resident")
        if not isinstance(resident, list) or not all(isinstance(name, str) for name in resident):
            raise FormatError("placement: resident is no list of names")
        sizes = info.get("bytes")
        if not isinstance(sizes, dict) or not set(sizes) <= set(PURPOSES):
            raise FormatError(f"placement: bytes are no table of {', '.join(PURPOSES)}")
        return cls(
            hot=np.unpackbits(bits, axis=1, count=n_neurons).astype(bool),
            processor=_word(info, "processor", (ON_GPU, ON_CPU)),
            solver=_word(info, "solver", None),
            resident=tuple(resident),
            n_bytes={name: _count(sizes, name) for name in sizes},
            hardware=None if hardware is None else hardware_from_dict(hardware, "placement"),
            **numbers,
        )


def _count(info: dict[str, Any], name: str) -> int:
    value = info.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise FormatError(f"placement: {name} is {str(value)[:20]}, expected a whole number from 0 on")
    return value


def _word(info: dict[str, Any], name: str, known: tuple[str, ...] | None) -> str:
    value = info.get(name)
    if not isinstance(value, str) or len(value) > _MOST_NAME or (known and value not in known):
        expected = " or ".join(known or ["a name"])
        raise FormatError(f"placement: {name} is {str(value)[:20]!r}, expected {expected}")
    return value


def _neuron_bytes(hot: np.ndarray, model: ModelBytes) -> int:
    return sum(int(count) * each for count, each in zip(hot.sum(1), model.neuron))


def often(counts: np.ndarray, tokens: int) -> np.ndarray:
    """bool [L, F]: the neurons of each layer that fired for at least half of the tokens, the most frequent
    ones in whole panels of 16.
    """
    hot = np.zeros(counts.shape, bool)
    for layer, each in enumerate(counts):
        number = int((each >= OFTEN * tokens).sum()) // PANEL_NEURONS * PANEL_NEURONS if tokens else 0
        hot[layer, np.argsort(-each, kind="stable")[:number]] = True
    return hot


def place_on_cpu(counts: np.ndarray, tokens: int, model: ModelBytes) -> Placement:
    """The placement for a machine without a GPU, or whose budget is nothing.

    counts : int64 [L, F], how often each neuron fired in so many tokens
    """
    _check(counts, model)
    hot = often(counts, tokens)
    objective = int(counts[hot].sum())
    return Placement(
        hot=hot,
        processor=ON_CPU,
        budget_bytes=0,
        n_ctx=model.n_ctx,
        objective=objective,
        greedy_objective=objective,
        bound=objective,
        total=int(counts.sum()),
        solver="share",
    )


def place(
    counts: np.ndarray,
    model: ModelBytes,
    budget_bytes: int,
    hardware: Hardware | None,
    solver: str = "exact",
    time_limit_seconds: float = 10.0,
) -> tuple[Placement, list[str]]:
    """The placement for a GPU with so much memory, and sentences that the user should read.

    counts : int64 [L, F];  hardware : None when the meeting of both processors shall cost nothing
    raises InputError for counts of another model, an unknown solver or a budget below 0
    """
    _check(counts, model)
    if budget_bytes < 0:
        raise InputError(f"the budget is {budget_bytes} bytes, expected at least 0")
    resident, sizes = model.resident(budget_bytes)
    left = budget_bytes - sum(sizes.values()) if resident else 0
    order = np.argsort(-counts, axis=1, kind="stable")
    problem = _problem(np.take_along_axis(counts, order, 1), model, left, hardware)
    found = solve(problem, solver, time_limit_seconds)
    hot = np.zeros(counts.shape, bool)
    for layer, groups in enumerate(found.groups):
        hot[layer, order[layer, : groups * GROUP]] = True
    placement = Placement(
        hot=hot,
        processor=ON_GPU,
        budget_bytes=budget_bytes,
        n_ctx=model.n_ctx,
        objective=found.objective,
        greedy_objective=found.greedy_objective,
        bound=found.bound,
        total=int(counts.sum()),
        solver=found.solver,
        resident=resident,
        n_bytes={**sizes, NEURONS: _neuron_bytes(hot, model)},
        hardware=hardware,
    )
    return placement, [*_notices(placement, model, problem), *found.notices]


def _problem(falling: np.ndarray, model: ModelBytes, budget: int, hardware: Hardware | None) -> Problem:
    """Groups of neurons that are in order of their counts. The last group of a layer may be smaller and takes
    the room of a whole one all the same, which keeps the groups of a layer alike.
    """
    n_layers, n_neurons = falling.shape
    n_groups = -(-n_neurons // GROUP)
    whole = np.zeros((n_layers, n_groups * GROUP), np.int64)
    whole[:, :n_neurons] = falling
    least = []
    for n_bytes in model.neuron:
        fewest = 1 if hardware is None else hardware.least_neurons(n_bytes)
        # None: no number is allowed. Otherwise all of them are: where the CPU has no part, nobody meets.
        least.append(n_groups + 1 if fewest is None else min(-(-fewest // GROUP), n_groups))
    sums = whole.reshape(n_layers, n_groups, GROUP).sum(2)
    return Problem(sums, tuple(GROUP * each for each in model.neuron), tuple(least), budget)


def _check(counts: np.ndarray, model: ModelBytes) -> None:
    shape = (model.n_layers, model.n_neurons)
    if counts.shape != shape or counts.dtype.kind != "i":
        raise InputError(f"counts are {counts.dtype} {list(counts.shape)}, expected integers {list(shape)}")
    if counts.size and not 0 <= counts.min() <= counts.max() < (1 << 62) // counts.size:
        raise InputError(
            f"counts are {counts.min()} to {counts.max()}, expected 0 to {(1 << 62) // counts.size}"
        )


def _notices(placement: Placement, model: ModelBytes, problem: Problem) -> list[str]:
    """What a person would not expect of the plan."""
    budget = format_amount(placement.budget_bytes, "bytes")
    if not placement.resident:
        least = format_amount(model.scratch, "bytes")
        return [
            f"the budget of {budget} is less than the {least} that a step works in: nothing is on the GPU"
        ]
    found = []
    for what, purpose in (("attention and KV cache", ATTENTION), ("predictors", PREDICTORS)):
        parts = [(name, sum(each.values())) for name, each in model.parts() if name.endswith(f".{purpose}")]
        there = sum(name in placement.resident for name, _ in parts)
        if there < len(parts):
            needed = format_amount(sum(n_bytes for _, n_bytes in parts), "bytes")
            found.append(
                f"the budget of {budget} holds the {what} of {there} of {len(parts)} layers, all of which "
                f"need {needed}; the others stay with the CPU"
            )
    if OUTPUT not in placement.resident:
        found.append(f"the output head, {format_amount(model.output, 'bytes')}, stays with the CPU")
    if not placement.hot.any():
        if all(least > problem.counts.shape[1] for least in problem.least):
            found.append("the GPU reads its memory no faster than the CPU does: no neuron is placed")
        elif problem.counts.any():
            found.append(f"the budget of {budget} leaves no room for neurons: none is placed")
    return found


def fit(
    placement: Placement,
    model: ModelBytes,
    budget_bytes: int,
    counts: np.ndarray | None = None,
    tokens: int = 0,
) -> tuple[Placement, str | None]:
    """The placement of a file where it fits the present GPU memory and context, or else another one and a
    sentence that says so. For when a model is loaded: it takes milliseconds, 0.3 s for a model of 70 billion.

    budget_bytes : 0 where there is no GPU;  counts, tokens : of the file's profile, None where it has none
    """
    if budget_bytes == 0:
        if placement.processor == ON_CPU:
            return placement, None
        made_for = format_amount(placement.budget_bytes, "bytes")
        why = f"the placement is for {made_for} of GPU memory, there is none"
        if counts is None:
            nothing = replace(placement, hot=np.zeros_like(placement.hot), processor=ON_CPU, resident=())
            nothing = replace(nothing, n_bytes={}, objective=0, greedy_objective=0, bound=0)
            return nothing, f"{why}: no neuron is hot"
        return place_on_cpu(counts, tokens, model), f"{why}: neurons that fire often are computed always"
    needed = placement.needed_bytes(model)
    if placement.processor == ON_GPU and needed is not None and needed <= budget_bytes:
        return placement, None
    there = format_amount(budget_bytes, "bytes")
    if placement.processor == ON_CPU:
        why = f"the placement is for a machine without a GPU, here are {there}"
    elif needed is None:
        why = "the placement is for parts that this model does not have"
    else:
        why = f"the placement needs {format_amount(needed, 'bytes')} of GPU memory, there are {there}"
    known = placement.hot.astype(np.int64) if counts is None else counts
    replaced, _ = place(known, model, budget_bytes, placement.hardware, "greedy")
    return replaced, f"{why}: a greedy one takes its place; `pyinfer-convert place` makes the best one"
