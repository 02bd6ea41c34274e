"""Linears that skip neurons: against the reference for every type, and to the bit against dense ones."""

from __future__ import annotations

import numpy as np
import pytest
from block_samples import float_tensor, random_tensor
from hypothesis import given, settings
from hypothesis import strategies as st
from small_programs import Both, Ops
from test_ops import TABLE_ROWS, check, columns_of, exact_table, table, team  # noqa: F401
from tolerance import ACTIVATIONS, FLOATS, LINEAR, linear_rounded

from pyinfer import quants
from pyinfer.cpu.lowering import MOST_BY_ROWS
from pyinfer.jit.team import Team

BOUND = 1e-10  # float32 sums of codes, of which the zero point is taken off at the end
NEURONS = 96
FEW = (1, 2, 4, 5, 8, 9, 16)


def masks(random: np.random.Generator, share: float, width: int = NEURONS) -> np.ndarray:
    values = table(width, random)
    values[random.random(values.shape) >= share] = 0
    values[5] = 0
    return values


def width_of(kind: str) -> int:
    return max(columns_of(kind), 256) if kind.endswith("_k") else columns_of(kind)


@pytest.mark.parametrize("kind", quants.names())
@pytest.mark.parametrize("share", [0.1, 1.0])
def test_linear_t_of_every_type(kind, share, team):  # noqa: F811
    """With a bias and a residual; many rows round activations and weights to 8 bits."""
    random, ops, width = np.random.default_rng(24), Ops(), width_of(kind)
    x, r = ops.rows("x", masks(random, share)), ops.rows("r", table(width, random))
    bias = float_tensor("b", random.standard_normal(width))
    y = ops.emit("linear_t", (x,), width, random_tensor("w", kind, NEURONS, width, random), bias)
    many = None if kind in FLOATS else 2 * ACTIVATIONS
    check(ops.finish(ops.emit("add", (r, y), width)), team, max(LINEAR[kind], BOUND), random, many)


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
def test_linear_t_of_several_slabs(kind, team):  # noqa: F811
    """More neurons than are turned into panels at once, and a last slab that is no whole chunk."""
    random, ops, neurons = np.random.default_rng(25), Ops(), 2 * 1024 + 96
    x = ops.rows("x", masks(random, 0.5, neurons))
    y = ops.emit("linear_t", (x,), 160, random_tensor("w", kind, neurons, 160, random))
    check(ops.finish(y), team, BOUND, random, 2 * ACTIVATIONS)


@pytest.mark.parametrize("kind", ["q4_0", "q5_1", "q2_k", "f16"])
@pytest.mark.parametrize("first", [32, 64])
def test_linear_t_of_two_inputs(kind, first, team):  # noqa: F811
    """One behind the other."""
    random, ops, width = np.random.default_rng(27), Ops(), width_of(kind)
    x, more = (ops.rows(f"x{n}", masks(random, 0.4, n)) for n in (first, NEURONS - first))
    y = ops.emit("linear_t", (x, more), width, random_tensor("w", kind, NEURONS, width, random))
    many = None if kind in FLOATS else 2 * ACTIVATIONS
    check(ops.finish(y), team, max(LINEAR[kind], BOUND), random, many)


@pytest.mark.parametrize("kind", quants.names())
@pytest.mark.parametrize("times", [True, False])
def test_linear_at_of_every_type(kind, times, team):  # noqa: F811
    """A mask that multiplies, or scores with a threshold for each neuron (some always, some never)."""
    random, ops, width = np.random.default_rng(26), Ops(), width_of(kind)
    x, mask = ops.rows("x", exact_table(width, random)), ops.rows("m", masks(random, 0.2))
    thresholds = random.standard_normal(NEURONS).astype(np.float32)
    thresholds[:5], thresholds[5:9] = -np.inf, np.inf
    weight = random_tensor("w", kind, NEURONS, width, random)
    bias = float_tensor("b", random.standard_normal(NEURONS))
    params = {"times": times, "thresholds": None if times else thresholds}
    y = ops.emit("linear_at", (x, mask), NEURONS, weight, bias, **params)
    both = Both(ops.finish(y), team)
    for n in (*FEW, 33):
        both.reference.guesses = n <= MOST_BY_ROWS
        found, expected = both.step(random.integers(0, TABLE_ROWS, n))
        error, size = ((found - expected) ** 2).mean(), (expected**2).mean()
        assert error <= max(linear_rounded(kind), BOUND) * size, f"{n} rows"


def _ffn(weights, mode: str, x: np.ndarray):
    """A ReGLU layer, dense or exact; both keep down neuron by neuron."""
    gate, up, down = weights
    ops = Ops()
    h = ops.rows("x", x)
    g = ops.emit("linear", (h,), gate.rows, gate)
    if mode == "dense":
        u = ops.emit("linear", (h,), up.rows, up)
        hidden = ops.emit("gate", (g, u), gate.rows, activation="relu")
    else:
        a = ops.emit("activate", (g,), gate.rows, activation="relu")
        hidden = ops.emit("linear_at", (h, a), up.rows, up, times=True, thresholds=None)
    return ops.finish(ops.emit("linear_t", (hidden,), down.columns, down))


@pytest.mark.parametrize("kind", ["q4_0", "q4_k", "q6_k", "q8_0", "f16", "f32"])
@pytest.mark.parametrize("threads", [1, 3])
def test_exact_equals_dense_to_the_bit(kind, threads):
    """For one row and few, whatever the number of threads; x with no and with all neurons active."""
    random, width, neurons = np.random.default_rng(27), width_of(kind), 176
    weights = [random_tensor(name, kind, neurons, width, random) for name in ("gate", "up", "down")]
    x = table(width, random)
    x[0], x[1] = 0, np.abs(x[1])
    teams = [Team(threads), Team(2)]
    try:
        exact, dense = (
            Both(_ffn(weights, mode, x), each).cpu for mode, each in zip(("exact", "dense"), teams)
        )
        for n in FEW:
            rows = np.arange(n), np.arange(n), np.zeros(n, int), np.arange(n)
            assert np.array_equal(exact.step(*rows), dense.step(*rows)), f"{n} rows"
    finally:
        for each in teams:
            each.close()


@given(seed=st.integers(0, 2**31), share=st.sampled_from([0.0, 0.02, 0.3, 1.0]), n=st.sampled_from(FEW))
@settings(max_examples=40, deadline=None)
def test_any_mask_of_ones(seed, share, n, team):  # noqa: F811
    """What is asked for is what a dense linear gives, to the bit; the rest is zero."""
    random = np.random.default_rng(seed)
    x, mask = table(64, random), (random.random((TABLE_ROWS, NEURONS)) < share).astype(np.float32)
    data = random_tensor("w", "q4_0", NEURONS, 64, random)
    step = np.arange(n), np.arange(n), np.zeros(n, int), np.arange(n)
    sparse, dense = Ops(), Ops()
    params = {"times": True, "thresholds": None}
    inputs = sparse.rows("x", x), sparse.rows("m", mask)
    y = sparse.emit("linear_at", inputs, NEURONS, data, **params)
    z = dense.emit("linear", (dense.rows("x", x),), NEURONS, data)
    found, expected = (Both(ops.finish(v), team).cpu.step(*step) for ops, v in ((sparse, y), (dense, z)))
    assert np.array_equal(found, np.where(mask[:n] != 0, expected, 0))
