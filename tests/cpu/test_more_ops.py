"""Ops of families unlike llama against the reference: LayerNorm, ungated FFNs, neuron-major weights."""

from __future__ import annotations

import numpy as np
import pytest
from block_samples import float_tensor, random_tensor
from small_programs import Both, Ops
from test_ops import TABLE_ROWS, check, table, team  # noqa: F401
from tolerance import EXACT, LINEAR

from pyinfer.cpu import activations

BOUND = 1e-11  # float32 additions and products, and erf by a polynomial of 1.5e-7


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("width", [96, 40])
def test_layer_norm(width, bias, team):  # noqa: F811
    random, ops = np.random.default_rng(21), Ops()
    weight = float_tensor("norm", random.standard_normal(width))
    x = ops.rows("x", table(width, random) * np.float32(1e-2) + np.float32(3))
    given = float_tensor("bias", random.standard_normal(width)) if bias else None
    y = ops.emit("layer_norm", (x,), width, weight, given, epsilon=1e-5)
    check(ops.finish(y), team, 1e-8, random)  # the mean is 300 times the deviation: (2^-24 * 300)^2 and more


@pytest.mark.parametrize("name", [name for name in activations.NAMES if name != "drelu"])
def test_activate(name, team):  # noqa: F811
    random, ops = np.random.default_rng(22), Ops()
    values = table(80, random) * 3
    values[0, :8] = 0.0, -0.0, 60.0, -60.0, 0.5, 0.49, 1e-20, -1e-20
    activation = "fatrelu:0.5" if name == "fatrelu" else name
    y = ops.emit("activate", (ops.rows("x", values),), 80, activation=activation)
    check(ops.finish(y), team, BOUND, random)


@pytest.mark.parametrize("activation", ["gelu_erf", "relu2", "fatrelu:0.01", "drelu"])
def test_gate(activation, team):  # noqa: F811
    random, ops = np.random.default_rng(23), Ops()
    g, u = ops.rows("g", table(80, random)), ops.rows("u", table(80, random))
    y = ops.emit("gate", (g, u), 80, activation=activation)
    check(ops.finish(y), team, BOUND, random)


def test_slices_of_a_linear(team):  # noqa: F811
    """Parts of a fused matrix go their own ways and are freed at their own times."""
    random, ops = np.random.default_rng(25), Ops()
    x = ops.rows("x", table(64, random))
    y = ops.emit("linear", (x,), 112, random_tensor("w", "f32", 112, 64, random))
    parts = [ops.emit("slices", (y,), width, start=start) for start, width in ((0, 48), (48, 48), (96, 16))]
    z = ops.emit("gate", (parts[0], parts[1]), 48, activation="relu")
    z = ops.emit("linear", (z,), 16, random_tensor("v", "f32", 16, 48, random))
    check(ops.finish(ops.emit("add", (z, parts[2]), 16)), team, LINEAR["f32"] * 10, random)


def test_scale(team):  # noqa: F811
    random, ops = np.random.default_rng(26), Ops()
    y = ops.emit("scale", (ops.rows("x", table(56, random)),), 56, factor=0.12)
    check(ops.finish(y), team, EXACT, random)


@pytest.mark.parametrize("kind", ["f32", "f16", "q8_0"])
def test_embed_position(kind, team):  # noqa: F811
    random, ops = np.random.default_rng(27), Ops()
    x = ops.rows("x", table(64, random))
    weight = random_tensor("positions", kind, 66, 64, random)
    y = ops.emit("embed_position", (x,), 64, weight, scale=1.0, offset=2)
    both = Both(ops.finish(y), team)
    for positions in ([0], [63], [5, 6, 7], np.arange(33)):
        n = len(positions)
        found, expected = both.step(random.integers(0, TABLE_ROWS, n), positions)
        assert ((found - expected) ** 2).mean() <= EXACT * (expected**2).mean()
