"""The solver against all plans there are, one by one; the greedy plan and the bound around it."""

from __future__ import annotations

import importlib.util
import itertools
import sys

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pyinfer.errors import InputError
from pyinfer.neurons import solver
from pyinfer.neurons.solver import MIP_MISSING, Problem, solve, solve_exact, solve_greedy

needs_mip = pytest.mark.skipif(importlib.util.find_spec("mip") is None, reason="python-mip is not installed")


@st.composite
def problems(draw, most_sizes=3):
    """Up to four layers of up to four groups, of up to `most_sizes` sizes."""
    n_layers, n_groups = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    row = st.lists(st.integers(0, 30), min_size=n_groups, max_size=n_groups)
    counts = [sorted(draw(row), reverse=True) for _ in range(n_layers)]
    sizes = draw(st.lists(st.integers(1, 9), min_size=most_sizes, max_size=most_sizes))
    group_bytes = tuple(draw(st.sampled_from(sizes)) for _ in range(n_layers))
    least = tuple(draw(st.integers(0, n_groups + 1)) for _ in range(n_layers))
    budget = draw(st.integers(0, 9 * n_layers * n_groups))
    return Problem(np.array(counts, np.int64), group_bytes, least, budget)


def best_of_all(problem: Problem) -> int:
    """The most counts of any set of groups that keeps the rules, tried one by one in plain integers."""
    counts, n_groups = problem.counts.tolist(), problem.counts.shape[1]
    choices = []
    for row, n_bytes, least in zip(counts, problem.group_bytes, problem.least):
        of_layer = {}
        for chosen in itertools.product((0, 1), repeat=n_groups):
            if sum(chosen) == 0 or sum(chosen) >= least:
                value = sum(count for count, taken in zip(row, chosen) if taken)
                of_layer[sum(chosen)] = max(of_layer.get(sum(chosen), 0), value)
        choices.append([(number * n_bytes, value) for number, value in of_layer.items()])
    plans = itertools.product(*choices)
    return max(
        sum(value for _, value in plan)
        for plan in plans
        if sum(n_bytes for n_bytes, _ in plan) <= problem.budget_bytes
    )


def keeps_the_rules(problem: Problem, groups: np.ndarray) -> bool:
    used = sum(int(k) * n_bytes for k, n_bytes in zip(groups, problem.group_bytes))
    whole = all(k == 0 or least <= k <= problem.counts.shape[1] for k, least in zip(groups, problem.least))
    return whole and used <= problem.budget_bytes


def counts_of(problem: Problem, groups: np.ndarray) -> int:
    return sum(sum(row[:k]) for row, k in zip(problem.counts.tolist(), groups.tolist()))


@settings(max_examples=400, deadline=None)
@given(problems())
def test_exact_is_the_best_of_all_plans(problem):
    best = best_of_all(problem)
    found = solve(problem)
    assert found.solver == "exact" and found.notices == ()
    assert keeps_the_rules(problem, found.groups)
    assert found.objective == counts_of(problem, found.groups) == best == found.bound
    assert found.gap == 0


@settings(max_examples=400, deadline=None)
@given(problems(most_sizes=4))
def test_greedy_keeps_the_rules_and_the_bound_holds(problem):
    groups, bound = solve_greedy(problem)
    best = best_of_all(problem)
    assert keeps_the_rules(problem, groups)
    assert counts_of(problem, groups) <= best <= bound


@needs_mip
@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(problems(most_sizes=4))
def test_the_integer_program_is_the_best_of_all_plans(problem):
    found = solve(problem, "mip")
    assert found.solver == "mip" and found.notices == ()
    assert keeps_the_rules(problem, found.groups)
    assert found.objective == counts_of(problem, found.groups) == best_of_all(problem)
    assert found.greedy_objective <= found.objective <= found.bound


def power_law(n_layers: int, n_neurons: int, seed: int = 0) -> np.ndarray:
    """int64 [L, groups of 64]: counts that fall as a power of the rank, as those of ReLU models do."""
    random = np.random.default_rng(seed)
    ranks = np.arange(1, n_neurons + 1)
    shares = np.stack([np.minimum(1, ranks ** -random.uniform(0.6, 1.4) * 300) for _ in range(n_layers)])
    counts = np.sort(random.binomial(100_000, shares), axis=1)[:, ::-1]
    return counts.reshape(n_layers, -1, 64).sum(2)


LARGE = power_law(80, 28672)  # LLaMA-70B


@pytest.mark.parametrize("sizes", [(13824,), (13824, 15552), (13824, 15552, 16000)])
def test_a_large_model_is_solved_exactly(sizes):
    group_bytes = tuple(64 * sizes[layer % len(sizes)] for layer in range(80))
    problem = Problem(LARGE, group_bytes, (40,) * 80, sum(group_bytes) * 448 // 10)
    found = solve(problem)
    bound = solve_greedy(problem)[1]
    assert keeps_the_rules(problem, found.groups)
    assert found.greedy_objective <= found.objective <= bound
    # Greedy and bound differ by less than the one piece that is split between them.
    assert bound - found.greedy_objective <= problem.gains[:, 40].max()


@needs_mip
def test_a_large_model_by_the_integer_program_is_the_exact_plan():
    problem = Problem(LARGE, (64 * 13824,) * 80, (40,) * 80, 64 * 13824 * 80 * 448 // 10)
    found = solve(problem, "mip", 60.0)
    assert found.solver == "mip" and found.notices == ()
    assert found.objective == solve(problem).objective <= found.bound
    assert found.gap < 1e-6


@needs_mip
def test_the_best_plan_counts_when_the_time_is_up():
    group_bytes = tuple(64 * (13824, 15552)[layer % 2] for layer in range(80))
    problem = Problem(LARGE, group_bytes, (40,) * 80, sum(group_bytes) * 448 // 10)
    found = solve(problem, "mip", 0.05)
    assert keeps_the_rules(problem, found.groups)
    assert found.greedy_objective <= found.objective <= solve(problem).objective <= found.bound
    assert found.notices == ("the solver's time was up; this is the best plan that it had",)


def test_without_mip_the_exact_solver_takes_over(monkeypatch):
    monkeypatch.setitem(sys.modules, "mip", None)  # as if it were not installed
    problem = Problem(LARGE[:4], (64,) * 4, (2,) * 4, 64 * 300)
    found = solve(problem, "mip")
    assert found.notices == (MIP_MISSING,) and "pip install" in MIP_MISSING
    assert found.solver == "exact" and found.objective == solve(problem).objective


def test_a_broken_mip_is_a_sentence(monkeypatch):
    class Broken:
        MAXIMIZE, CBC = "MAX", "CBC"

        def Model(self, **options):
            raise FileNotFoundError("no library\nfor this system")

    monkeypatch.setitem(sys.modules, "mip", Broken())
    found = solve(Problem(LARGE[:2], (64, 64), (1, 1), 6400), "mip")
    assert found.solver == "exact"
    assert found.notices == (
        "mip cannot be used here (no library for this system): the exact solver found the plan instead",
    )


def test_too_large_for_the_table_or_of_too_many_sizes_is_greedy(monkeypatch):
    problem = Problem(LARGE[:4], (64, 65, 66, 67), (1,) * 4, 20_000)
    found = solve(problem)
    assert found.solver == "greedy" and found.objective <= found.bound and "greedy" in found.notices[0]
    alike = Problem(LARGE[:4], (64,) * 4, (1,) * 4, 20_000)
    assert solve_exact(alike) is not None
    monkeypatch.setattr(solver, "MOST_WORK", 1000)
    assert solve_exact(alike) is None
    assert solve(alike).solver == "greedy"


def test_nothing_to_gain_takes_nothing():
    zeros = Problem(np.zeros((2, 3), np.int64), (5, 5), (1, 1), 1000)
    for name in ("exact", "greedy"):
        assert solve(zeros, name).groups.tolist() == [0, 0]
    empty = Problem(LARGE[:2], (5, 5), (1, 1), 0)
    assert solve(empty).groups.tolist() == [0, 0] and solve(empty).bound == 0
    never = Problem(LARGE[:2], (5, 5), (449, 449), 10**9)
    assert solve(never).groups.tolist() == [0, 0]


@pytest.mark.parametrize(
    "arguments",
    [
        (np.array([[1, 2]]), (1,), (1,), 1),
        (np.array([[2, -1]]), (1,), (1,), 1),
        (np.array([[2, 1]]), (1, 1), (1,), 1),
        (np.array([[2, 1]]), (0,), (1,), 1),
        (np.array([[2, 1]]), (1,), (1,), -1),
    ],
)
def test_a_contradictory_problem_is_refused(arguments):
    with pytest.raises(InputError):
        Problem(*arguments)


def test_an_unknown_solver_is_refused():
    with pytest.raises(InputError, match="expected one of exact, mip, greedy"):
        solve(Problem(LARGE[:1], (1,), (1,), 1), "magic")
    for seconds in (0, -1, float("nan")):
        with pytest.raises(InputError, match="expected more than 0"):
            solve(Problem(LARGE[:1], (1,), (1,), 1), "mip", seconds)
