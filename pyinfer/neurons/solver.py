"""Which neurons a GPU gets: the paper's integer program, solved three ways.

Neurons of a layer are sorted by how often they fired and taken 64 at a time: a *group*. Chosen are groups of
the greatest sum of counts whose bytes fit the budget, none of a layer or at least the number that repays the
meeting of both processors. A layer's best choice of k groups is its first k, so a plan is one k per layer:

    maximize sum_l f_l(k_l)   with   sum_l bytes_l k_l <= budget,   k_l = 0 or least_l <= k_l <= groups_l

- greedy: first groups (`least_l` at once) and then single ones, in order of counts per byte, each that still
  fits. f_l is concave behind its first piece and that piece is the steepest, so the order is also that of the
  linear relaxation: the first piece that does not fit, in part, gives an upper bound.
- exact: layers of equal group size by a dynamic program over (layers, groups taken), exact integers; up to
  three sizes (a file may mix types) are then combined by trying all ways to share the budget.
- mip: the same as an integer program in python-mip (optional), which starts from the greedy plan. The paper's
  C_l y_l <= sum x <= K y_l has the same solutions; here the first C_l groups are y_l itself, which makes the
  relaxation tight: 1 s instead of 7 for 80 layers of 448 groups.

Source: Song et al. 2024 (PowerInfer), section 6.3, equations 2 to 8.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from pyinfer.errors import InputError

GROUP = 64
SOLVERS = ("exact", "mip", "greedy")
MIP_MISSING = "mip is not installed (pip install 'pyinfer[solve]'); the exact solver found the plan instead"
MOST_SIZES = 3
MOST_CELLS, MOST_WORK = 50_000_000, 20_000_000_000  # of the dynamic program: 400 MB, about 10 s


@dataclass(frozen=True)
class Problem:
    """counts : int64 [L, G], per layer the sums of its groups, falling;  budget_bytes : for all groups
    group_bytes : per layer, of one group;  least : per layer, the fewest groups; above G: none is allowed
    """

    counts: np.ndarray
    group_bytes: tuple[int, ...]
    least: tuple[int, ...]
    budget_bytes: int

    def __post_init__(self) -> None:
        if self.counts.ndim != 2 or not len(self.counts) == len(self.group_bytes) == len(self.least):
            raise InputError("counts, group_bytes and least are of different numbers of layers")
        if self.counts.size and (self.counts.min() < 0 or (np.diff(self.counts, axis=1) > 0).any()):
            raise InputError("the groups of a layer must have falling counts from 0 on")
        if min(self.group_bytes, default=1) < 1 or self.budget_bytes < 0:
            raise InputError("a group must have at least one byte, and the budget none below 0")

    @cached_property
    def gains(self) -> np.ndarray:
        """int64 [L, G + 1]: counts of the first k groups."""
        out = np.zeros((len(self.counts), self.counts.shape[1] + 1), np.int64)
        np.cumsum(self.counts, axis=1, out=out[:, 1:])
        return out

    def first(self, layer: int) -> int:
        """Groups of a layer's smallest choice above none."""
        return max(1, self.least[layer])

    def objective(self, groups: np.ndarray) -> int:
        return int(self.gains[np.arange(len(groups)), groups].sum())

    def used_bytes(self, groups: np.ndarray) -> int:
        return sum(int(k) * each for k, each in zip(groups, self.group_bytes))

    def allows(self, groups: np.ndarray) -> bool:
        most = self.counts.shape[1]
        whole = all(k == 0 or self.first(layer) <= k <= most for layer, k in enumerate(groups))
        return whole and self.used_bytes(groups) <= self.budget_bytes


@dataclass(frozen=True, eq=False)
class Solution:
    """groups : int64 [L], how many of each layer;  objective : their counts;  bound : no plan has more
    solver : which one found it;  greedy_objective : of the greedy plan;  notices : sentences for the user
    """

    groups: np.ndarray
    objective: int
    bound: int
    solver: str
    greedy_objective: int
    seconds: float
    notices: tuple[str, ...] = field(default=())

    @property
    def gap(self) -> float:
        """What the objective may lack, as a part of the bound."""
        return (self.bound - self.objective) / self.bound if self.bound else 0.0


def solve(problem: Problem, solver: str = "exact", time_limit_seconds: float = 10.0) -> Solution:
    """The best plan that the solver finds; never worse than the greedy one. The limit is for mip.

    raises InputError for an unknown solver, or no time
    """
    if solver not in SOLVERS:
        raise InputError(f"solver is {solver!r}, expected one of {', '.join(SOLVERS)}")
    if not time_limit_seconds > 0:
        raise InputError(f"the time limit is {time_limit_seconds} s, expected more than 0")
    start = time.perf_counter()
    greedy, bound = solve_greedy(problem)
    best, used, notices = greedy, "greedy", []
    if solver == "mip":
        found = _solve_mip(problem, greedy, time_limit_seconds)
        if isinstance(found, str):
            solver, notices = "exact", [found]
        else:
            used, bound = "mip", min(bound, found.bound)
            if found.groups is not None and problem.objective(found.groups) > problem.objective(best):
                best = found.groups
            if not found.finished:
                notices.append("the solver's time was up; this is the best plan that it had")
    if solver == "exact":
        groups = solve_exact(problem)
        if groups is None:
            notices.append("the model is too large or too mixed for the exact solver: the plan is greedy")
        else:
            best, used, bound = groups, "exact", problem.objective(groups)
    objective = problem.objective(best)
    return Solution(
        groups=best,
        objective=objective,
        bound=max(bound, objective),
        solver=used,
        greedy_objective=problem.objective(greedy),
        seconds=time.perf_counter() - start,
        notices=tuple(notices),
    )


def solve_greedy(problem: Problem) -> tuple[np.ndarray, int]:
    """groups int64 [L] in order of counts per byte, and an upper bound of every plan's counts."""
    groups = np.zeros(len(problem.counts), np.int64)
    left, value, bound = problem.budget_bytes, 0, None
    for layer, before, after in _pieces(problem):
        gain = int(problem.gains[layer, after] - problem.gains[layer, before])
        cost = (after - before) * problem.group_bytes[layer]
        if not gain:
            break
        if cost > left and bound is None:
            bound = value - -gain * left // cost  # rounded up: the order above is one of rounded numbers
        if cost <= left and groups[layer] == before:
            groups[layer], left, value = after, left - cost, value + gain
    return groups, value if bound is None else bound


def _pieces(problem: Problem) -> list[tuple[int, int, int]]:
    """(layer, groups before, groups after), the most counts per byte first; in a layer always in order."""
    layers, befores, afters, densities = [], [], [], []
    most = problem.counts.shape[1]
    for layer, each in enumerate(problem.group_bytes):
        first = problem.first(layer)
        if first > most:
            continue
        before = np.concatenate([[0], np.arange(first, most)]).astype(np.int64)
        after = np.concatenate([[first], np.arange(first + 1, most + 1)]).astype(np.int64)
        gains = problem.gains[layer, after] - problem.gains[layer, before]
        layers.append(np.full(len(before), layer))
        befores.append(before)
        afters.append(after)
        # A mean of what falls: rounded, equal ones may swap, and `solve_greedy` would skip the later half.
        densities.append(np.minimum.accumulate(gains / (after - before) / each))
    if not layers:
        return []
    order = np.argsort(-np.concatenate(densities), kind="stable")
    columns = [np.concatenate(column)[order].tolist() for column in (layers, befores, afters)]
    return list(zip(*columns))


def solve_exact(problem: Problem) -> np.ndarray | None:
    """groups int64 [L] of a best plan; None when the model is too large, or has neurons of more than three
    sizes.
    """
    n_layers, most = problem.counts.shape
    sizes = sorted(set(problem.group_bytes))
    if len(sizes) > MOST_SIZES:
        return None
    members = [[layer for layer in range(n_layers) if problem.group_bytes[layer] == size] for size in sizes]
    room = [min(problem.budget_bytes // size, most * len(those)) for size, those in zip(sizes, members)]
    cells = sum((n + 1) * (len(those) + 1) for n, those in zip(room, members))
    work = sum((n + 1) * len(those) * most for n, those in zip(room, members))
    if len(sizes) == MOST_SIZES:
        work += (room[0] + 1) * (room[1] + 1)
    if cells > MOST_CELLS or work > MOST_WORK:
        return None
    tables = [_best_by_count(problem, those, n) for those, n in zip(members, room)]
    taken = _share([table[-1] for table in tables], sizes, problem.budget_bytes)[1]
    groups = np.zeros(n_layers, np.int64)
    for those, table, count in zip(members, tables, taken):
        _trace(problem, those, table, count, groups)
    return groups


def _best_by_count(problem: Problem, layers: list[int], room: int) -> list[np.ndarray]:
    """After 0, 1, 2 ... of the layers: int64 [room + 1], the most counts of at most so many groups."""
    tables = [np.zeros(room + 1, np.int64)]
    other = np.empty(room + 1, np.int64)
    for layer in layers:
        before, gains = tables[-1], problem.gains[layer]
        best = before.copy()
        for k in range(problem.first(layer), min(len(gains) - 1, room) + 1):
            np.add(before[: room + 1 - k], gains[k], out=other[k:])
            np.maximum(best[k:], other[k:], out=best[k:])
        tables.append(best)
    return tables


def _trace(
    problem: Problem, layers: list[int], tables: list[np.ndarray], count: int, groups: np.ndarray
) -> None:
    """Write the groups of the layers that reach the table's last value at `count`."""
    for position in range(len(layers) - 1, -1, -1):
        layer, before, wanted = layers[position], tables[position], tables[position + 1][count]
        for k in (0, *range(problem.first(layer), min(problem.counts.shape[1], count) + 1)):
            if before[count - k] + problem.gains[layer, k] == wanted:
                groups[layer], count = k, count - k
                break


def _share(best: list[np.ndarray], sizes: list[int], budget: int) -> tuple[int, list[int]]:
    """The most counts of one to three tables within the budget, and how many groups of each."""
    if len(best) == 1:
        # The first place with the value of the last: fewer groups for the same counts.
        count = min(len(best[0]) - 1, budget // sizes[0])
        return int(best[0][count]), [int(np.searchsorted(best[0], best[0][count]))]
    if len(best) == 2:
        counts = np.arange(min(len(best[0]) - 1, budget // sizes[0]) + 1)
        others = np.minimum(len(best[1]) - 1, (budget - counts * sizes[0]) // sizes[1])
        value = best[0][counts] + best[1][others]
        count = int(value.argmax())
        return int(value[count]), [count, int(np.searchsorted(best[1], best[1][others[count]]))]
    value, rest, count = -1, [], 0
    for n, gain in enumerate(best[0].tolist()):
        other, taken = _share(best[1:], sizes[1:], budget - n * sizes[0])
        if gain + other > value:
            value, rest, count = gain + other, taken, n
    return value, [count, *rest]


@dataclass(frozen=True, eq=False)
class _MIPResult:
    groups: np.ndarray | None
    bound: int
    finished: bool


def _solve_mip(problem: Problem, start: np.ndarray, limit_seconds: float) -> _MIPResult | str:
    """What python-mip finds from the greedy plan on, or a sentence why it cannot be used."""
    try:
        import mip

        model = mip.Model(sense=mip.MAXIMIZE, solver_name=mip.CBC)
    except ImportError:
        return MIP_MISSING
    except Exception as error:  # a missing or unfit CBC shows in many ways
        why = " ".join(str(error).split())[:200]
        return f"mip cannot be used here ({why}): the exact solver found the plan instead"
    model.verbose = 0
    # Numbers near 1, as the tolerances of a floating-point solver want them.
    unit = float(problem.gains[:, -1].sum() or 1) / 1e4
    smallest, most = min(problem.group_bytes), problem.counts.shape[1]
    variables, cost, begin = [], [], []
    for layer, each in enumerate(problem.group_bytes):
        first = problem.first(layer)
        x = []
        if first <= most:
            values = [problem.gains[layer, first], *problem.counts[layer, first:]]
            x = [model.add_var(var_type=mip.BINARY, obj=float(value) / unit) for value in values]
            if len(x) > 1:
                model.add_constr(mip.xsum(x[1:]) <= (most - first) * x[0])
            taken = [float(start[layer] >= first + n) for n in range(len(x))]
            cost += [each / smallest * (1 if n else first) * one for n, one in enumerate(x)]
            begin += list(zip(x, taken))
        variables.append(x)
    if not cost:
        return _MIPResult(None, 0, True)
    model.add_constr(mip.xsum(cost) <= problem.budget_bytes / smallest)
    model.start, model.max_mip_gap = begin, 1e-9
    status = model.optimize(max_seconds=limit_seconds)
    bound = int(problem.gains[:, -1].sum())
    if model.objective_bound is not None and 0 <= model.objective_bound < 1e6:  # else it has none yet
        bound = int(model.objective_bound * unit * (1 + 1e-9)) + 1
    groups = None
    if model.num_solutions:
        chosen = [[round(one.x) for one in x] for x in variables]
        groups = np.array(
            [x[0] * problem.first(n) + sum(x[1:]) if x else 0 for n, x in enumerate(chosen)], np.int64
        )
        groups = groups if problem.allows(groups) else None
    return _MIPResult(groups, bound, status == mip.OptimizationStatus.OPTIMAL)
