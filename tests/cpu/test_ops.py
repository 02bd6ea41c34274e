"""Every op and every weight layout of the cpu executor against the reference, for one row, few and many."""

from __future__ import annotations

import numpy as np
import pytest
from block_samples import float_tensor, random_tensor
from small_programs import Both, Ops
from tolerance import LINEAR, OPS, linear_rounded, nmse

from pyinfer import quants
from pyinfer.cpu.lowering import MOST_BY_ROWS
from pyinfer.jit.team import Team
from pyinfer.program.rope import Rope

ROW_COUNTS = (1, 2, 4, 5, 8, 9, 33, 3, 1)  # one row, tiles of 4 and 8, whole and ragged; and back
TABLE_ROWS = 50


@pytest.fixture(scope="module")
def team():
    made = Team(2)
    yield made
    made.close()


def check(program, team, bound: float, random: np.random.Generator, many: float | None = None) -> None:
    """Both executors agree for all row counts, in one session; `many` is another bound for many rows."""
    both = Both(program, team)
    for n in ROW_COUNTS:
        found, expected = both.step(random.integers(0, TABLE_ROWS, n))
        assert found.dtype == np.float32 and found.shape == expected.shape == (n, program.vocab_size)
        allowed = many if many is not None and n > MOST_BY_ROWS else bound
        assert nmse(found, expected) <= allowed, f"{n} rows"


def table(width: int, random: np.random.Generator) -> np.ndarray:
    return random.standard_normal((TABLE_ROWS, width)).astype(np.float32)


def exact_table(width: int, random: np.random.Generator) -> np.ndarray:
    """Rows that 8 bits per 32 hold exactly: whole numbers up to 127, times a power of two."""
    values = random.integers(-127, 128, (TABLE_ROWS, width // 32, 32))
    values[:, :, 7] = 127 * random.choice([-1, 1], values.shape[:2])
    return (values * 2.0 ** random.integers(-6, 3, (TABLE_ROWS, width // 32, 1))).reshape(TABLE_ROWS, width)


def columns_of(kind: str) -> int:
    """An odd number of groups, or of blocks where blocks are larger."""
    return 3 * 256 if kind.endswith("_k") else 7 * 32


# ---- linear ----


@pytest.mark.parametrize("kind", quants.names())
def test_linear_of_every_type(kind, team):
    random, ops = np.random.default_rng(1), Ops()
    x = ops.rows("x", exact_table(columns_of(kind), random))
    y = ops.emit("linear", (x,), 37, random_tensor("w", kind, 37, columns_of(kind), random))
    check(ops.finish(y), team, LINEAR[kind], random)


@pytest.mark.parametrize("kind", quants.names())
def test_linear_rounds_activations_to_8_bits_at_most(kind, team):
    random, ops = np.random.default_rng(2), Ops()
    x = ops.rows("x", table(columns_of(kind), random))
    y = ops.emit("linear", (x,), 64, random_tensor("w", kind, 64, columns_of(kind), random))
    check(ops.finish(y), team, linear_rounded(kind), random)


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "q6_k", "f16"])
@pytest.mark.parametrize("watched", [0, 1, 2])
def test_linears_of_one_input(kind, watched, team):
    """Three matrices of odd sizes that become one instruction, two of them with biases."""
    random, ops, columns = np.random.default_rng(3), Ops(), columns_of(kind)
    x = ops.rows("x", exact_table(columns, random))
    made = []
    for number, rows in enumerate((37, 16, 5)):
        bias = float_tensor(f"b{number}", 10 * random.standard_normal(rows)) if number != 1 else None
        made.append(
            ops.emit("linear", (x,), rows, random_tensor(f"w{number}", kind, rows, columns, random), bias)
        )
    check(ops.finish(made[watched]), team, LINEAR[kind], random)


@pytest.mark.parametrize("kind", ["q4_0", "f32"])
@pytest.mark.parametrize("linear_first", [True, False])
def test_linear_and_residual(kind, linear_first, team):
    random, ops = np.random.default_rng(4), Ops()
    x = ops.rows("x", exact_table(96, random))
    bias = float_tensor("b", random.standard_normal(96))
    y = ops.emit("linear", (x,), 96, random_tensor("w", kind, 96, 96, random), bias)
    z = ops.emit("add", (y, x) if linear_first else (x, y), 96)
    check(ops.finish(z), team, LINEAR[kind], random)


def test_a_linear_that_is_read_twice_is_not_lost(team):
    """Adding it to the residual must not take away what another op reads."""
    random, ops = np.random.default_rng(5), Ops()
    x = ops.rows("x", table(48, random))
    y = ops.emit("linear", (x,), 48, random_tensor("w", "f32", 48, 48, random))
    z = ops.emit("add", (x, y), 48)
    check(ops.finish(ops.emit("gate", (z, y), 48, activation="relu")), team, LINEAR["f32"], random)


def test_twice_a_linear(team):
    random, ops = np.random.default_rng(6), Ops()
    x = ops.rows("x", table(48, random))
    y = ops.emit("linear", (x,), 48, random_tensor("w", "f32", 48, 48, random))
    check(ops.finish(ops.emit("add", (y, y), 48)), team, LINEAR["f32"], random)


def test_a_tall_and_a_wide_matrix(team):
    random, ops = np.random.default_rng(7), Ops()
    x = ops.rows("x", exact_table(32, random))
    y = ops.emit("linear", (x,), 1600, random_tensor("tall", "q8_0", 1600, 32, random))
    check(
        ops.finish(ops.emit("linear", (y,), 3, random_tensor("wide", "f16", 3, 1600, random))),
        team,
        1e-11,
        random,
    )


def test_rows_of_zeros(team):
    """A group without any number that is not zero has no scale to divide by."""
    random, ops = np.random.default_rng(8), Ops()
    values = exact_table(96, random)
    values[::2, 32:64] = 0
    values[1::4] = 0
    x = ops.rows("x", values)
    y = ops.emit("linear", (x,), 20, random_tensor("w", "q4_1", 20, 96, random))
    check(ops.finish(y), team, LINEAR["q4_1"], random)


# ---- the others ----


@pytest.mark.parametrize("kind", quants.names())
def test_embed(kind, team):
    random, ops = np.random.default_rng(9), Ops()
    weight = random_tensor("token_embd", kind, TABLE_ROWS, columns_of(kind), random)
    x = ops.emit("embed", (), weight.columns, weight, scale=7.5)
    check(ops.finish(x), team, max(OPS["embed"], LINEAR[kind]), random)


@pytest.mark.parametrize(("width", "heads"), [(96, 1), (40, 1), (96, 3), (64, 4)])
def test_rms_norm(width, heads, team):
    random, ops = np.random.default_rng(10), Ops()
    weight = float_tensor("norm", random.standard_normal(width // heads))
    x = ops.rows("x", table(width, random) * np.float32(1e-3))  # so small that epsilon counts
    y = ops.emit("rms_norm", (x,), width, weight, epsilon=1e-6, heads=heads)
    check(ops.finish(y), team, OPS["rms_norm"], random)


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_gate(activation, team):
    random, ops = np.random.default_rng(11), Ops()
    gates = table(80, random) * 3
    gates[0, :8] = 0.0, -0.0, 100.0, -100.0, 600.0, -600.0, 1e-20, -1e-20
    g, u = ops.rows("g", gates), ops.rows("u", table(80, random))
    y = ops.emit("gate", (g, u), 80, activation=activation)
    check(ops.finish(y), team, OPS[f"gate_{activation}"], random)


def test_add(team):
    random, ops = np.random.default_rng(12), Ops()
    y = ops.emit("add", (ops.rows("a", table(56, random)), ops.rows("b", table(56, random))), 56)
    check(ops.finish(y), team, OPS["add"], random)


@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize(("size", "rotated"), [(32, 32), (48, 16), (16, 2)])
def test_rope(neox, size, rotated, team):
    random, ops = np.random.default_rng(13), Ops()
    rope = Rope(rotated, 10_000.0, neox)
    y = ops.emit("rope", (ops.rows("x", table(3 * size, random)),), 3 * size, rope=rope, heads=3)
    both = Both(ops.finish(y), team)
    for n in ROW_COUNTS:
        found, expected = both.step(random.integers(0, TABLE_ROWS, n), random.integers(0, 64, n))
        assert nmse(found, expected) <= OPS["rope"]


@pytest.mark.parametrize("wanted", [[], [0], [8], [3, 4], [0, 2, 4, 6, 8], range(9)])
def test_select(wanted, team):
    random, ops = np.random.default_rng(14), Ops()
    x = ops.rows("x", table(48, random))
    x = ops.emit("linear", (x,), 48, random_tensor("w", "f32", 48, 48, random))
    program = ops.finish(ops.emit("select", (x,), 48))
    found, expected = Both(program, team).step(random.integers(0, TABLE_ROWS, 9), wanted=list(wanted))
    assert found.shape == expected.shape == (len(wanted), 48)
    assert not len(wanted) or nmse(found, expected) <= OPS["select"]


def test_every_op_and_type_has_a_bound():
    assert set(LINEAR) == set(quants.names())
