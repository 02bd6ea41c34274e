"""Normalization of rows."""

from __future__ import annotations

from numpy import float32, sqrt

from pyinfer.cpu.rows import BIAS, EPSILON, HEADS, IN, OUT, WEIGHT, WIDTH, row_at
from pyinfer.jit.kernel import kernel
from pyinfer.jit.memory import f32_at, i64_at


@kernel
def rms_norm(operands, step, first, last, thread):
    """out = x / sqrt(mean x^2 + epsilon) * weight, for each of HEADS parts of a row.

    Source: Zhang & Sennrich 2019.
    """
    given = i64_at(operands)
    heads = given[HEADS]
    width = given[WIDTH] // heads
    weight, epsilon = f32_at(given[WEIGHT]), f32_at(given[EPSILON])[0]
    for row in range(first, last):
        for head in range(heads):
            x = f32_at(row_at(given, IN, row, thread) + 4 * head * width)
            out = f32_at(row_at(given, OUT, row, thread) + 4 * head * width)
            total = float32(0)
            for i in range(width):
                total += x[i] * x[i]
            factor = float32(1) / sqrt(total / float32(width) + epsilon)
            for i in range(width):
                out[i] = x[i] * factor * weight[i]


@kernel
def layer_norm(operands, step, first, last, thread):
    """out = (x - mean x) / sqrt(variance of x + epsilon) * weight + bias. Source: Ba, Kiros & Hinton 2016."""
    given = i64_at(operands)
    width = given[WIDTH]
    weight, bias, epsilon = f32_at(given[WEIGHT]), f32_at(given[BIAS]), f32_at(given[EPSILON])[0]
    for row in range(first, last):
        x = f32_at(row_at(given, IN, row, thread))
        out = f32_at(row_at(given, OUT, row, thread))
        total = float32(0)
        for i in range(width):
            total += x[i]
        mean = total / float32(width)
        squares = float32(0)
        for i in range(width):
            squares += (x[i] - mean) * (x[i] - mean)
        factor = float32(1) / sqrt(squares / float32(width) + epsilon)
        if given[BIAS] != 0:
            for i in range(width):
                out[i] = (x[i] - mean) * factor * weight[i] + bias[i]
        else:
            for i in range(width):
                out[i] = (x[i] - mean) * factor * weight[i]
