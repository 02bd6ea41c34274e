"""Activation functions on rows: alone, or as the gate of a second row."""

from __future__ import annotations

from functools import cache

from numpy import float32

from pyinfer.cpu.math import fatrelu, gelu, gelu_erf, relu, relu2, silu
from pyinfer.cpu.rows import IN, IN2, NUMBER, OUT, WIDTH, row_at
from pyinfer.jit.kernel import Kernel, inline, kernel
from pyinfer.jit.memory import f32_at, i64_at

NAMES = ("silu", "gelu", "gelu_erf", "relu", "relu2", "fatrelu", "drelu")
SILU, GELU, GELU_ERF, RELU, RELU2, FATRELU, DRELU = range(len(NAMES))


@inline
def _apply(kind, x, threshold):
    if kind == SILU:
        return silu(x)
    if kind == GELU:
        return gelu(x)
    if kind == GELU_ERF:
        return gelu_erf(x)
    if kind == RELU2:
        return relu2(x)
    if kind == FATRELU:
        return fatrelu(x, threshold)
    return relu(x)


@cache
def gate(name: str) -> Kernel:
    """out = activation(a) * b; drelu is relu(a) * relu(b)."""
    return _gate_kernel(NAMES.index(name))


@cache
def activate(name: str) -> Kernel:
    """out = activation(a)"""
    return _activate_kernel(NAMES.index(name))


def _gate_kernel(kind: int) -> Kernel:
    @kernel
    def gate_rows(operands, step, first, last, thread):
        given = i64_at(operands)
        threshold = f32_at(given[NUMBER])[0]
        for row in range(first, last):
            a, b = f32_at(row_at(given, IN, row, thread)), f32_at(row_at(given, IN2, row, thread))
            out = f32_at(row_at(given, OUT, row, thread))
            for i in range(given[WIDTH]):
                if kind == DRELU:
                    out[i] = relu(a[i]) * relu(b[i])
                else:
                    out[i] = _apply(kind, a[i], threshold) * b[i]

    return gate_rows


def _activate_kernel(kind: int) -> Kernel:
    @kernel
    def activate_rows(operands, step, first, last, thread):
        given = i64_at(operands)
        threshold = f32_at(given[NUMBER])[0]
        for row in range(first, last):
            a, out = f32_at(row_at(given, IN, row, thread)), f32_at(row_at(given, OUT, row, thread))
            for i in range(given[WIDTH]):
                out[i] = _apply(kind, a[i], threshold)

    return activate_rows


@kernel
def keep(operands, step, first, last, thread):
    """out = 0 where |x| < NUMBER, else x"""
    given = i64_at(operands)
    least = f32_at(given[NUMBER])[0]
    for row in range(first, last):
        x, out = f32_at(row_at(given, IN, row, thread)), f32_at(row_at(given, OUT, row, thread))
        for i in range(given[WIDTH]):
            out[i] = float32(0) if abs(x[i]) < least else x[i]
