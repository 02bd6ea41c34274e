"""Words on columns of codes (`pyinfer.quants.columns`): four of them at once meet four bytes of x."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyinfer.jit.dots import dot
from pyinfer.jit.llvm import (
    I16,
    I32,
    LANES,
    TileType,
    constant,
    extend_half,
    f32x16,
    load,
    multiply_add,
    shuffle,
    splat,
    u8x64,
)

QUARTER = 16  # bytes that x86 shuffles without crossing


def _interleave(builder, a, b, unit):
    """The lower and the upper halves of every quarter of a and b, `unit` bytes in turn."""
    low, high = [], []
    for start in range(0, 64, QUARTER):
        for out, half in ((low, start), (high, start + QUARTER // 2)):
            for k in range(half, half + QUARTER // 2, unit):
                out += [*range(k, k + unit), *range(64 + k, 64 + k + unit)]
    return shuffle(builder, a, b, low), shuffle(builder, a, b, high)


def _four_by_four(builder, vectors):
    """Four vectors of bytes -> four of words, each of one byte of every vector: in quarter q of result i
    those of bytes 16 q + 4 i and on.
    """
    low = [_interleave(builder, vectors[k], vectors[k + 1], 1) for k in (0, 2)]
    return [part for half in (0, 1) for part in _interleave(builder, low[0][half], low[1][half], 2)]


@intrinsic(prefer_literal=True)
def tile_fill_i32(typingctx, tokens, value):
    """Integer tile whose elements are all `value`; `tokens` is a compile-time constant."""
    result = TileType("i32", tokens.literal_value)

    def generate(context, builder, signature, args):
        vector = splat(builder, builder.trunc(args[1], I32))
        tile = ir.Constant(result.llvm, ir.Undefined)
        for t in range(result.tokens):
            tile = builder.insert_value(tile, vector, t)
        return tile

    return result(tokens, types.int64), generate


@intrinsic
def tile_dot_columns(typingctx, acc, a, b, c, d, x):
    """acc[i] += outputs 16 i and on of the lines of four columns, each times its byte of x (int32).

    The tile has 8 rows for codes of 4 bits, 4 for 8 bits.
    """
    wide = acc.tokens == 4

    def generate(context, builder, signature, args):
        tile, x_ = args[0], builder.bitcast(splat(builder, args[5]), u8x64.llvm)
        lines = [load(builder, address, u8x64.llvm) for address in args[1:5]]
        if wide:
            parts = _four_by_four(builder, lines)
        else:
            nibble = constant(u8x64.llvm, 15)
            parts = _four_by_four(builder, [builder.and_(line, nibble) for line in lines])
            shifted = [builder.lshr(line, constant(u8x64.llvm, 4)) for line in lines]
            parts += _four_by_four(builder, shifted)
        for i, part in enumerate(parts):
            value = dot(builder, builder.extract_value(tile, i), part, x_, wide)
            tile = builder.insert_value(tile, value, i)
        return tile

    return acc(acc, *[types.int64] * 4, types.int32), generate


@intrinsic
def tile_add_columns(typingctx, total, acc, scales, factor):
    """total[i] += float(acc[i]) * (the 16 halves at scales + 32 i, times factor)."""

    def generate(context, builder, signature, args):
        out, acc_, scales_, factor_ = args
        factor_ = splat(builder, factor_)
        for i in range(total.tokens):
            halves = load(builder, scales_, ir.VectorType(I16, LANES), 32 * i)
            scale = builder.fmul(extend_half(builder, halves), factor_)
            number = builder.sitofp(builder.extract_value(acc_, i), f32x16.llvm)
            value = multiply_add(builder, number, scale, builder.extract_value(out, i))
            out = builder.insert_value(out, value, i)
        return out

    return total(total, acc, types.int64, types.float32), generate


@intrinsic
def tile_add_halves(typingctx, total, address, factor):
    """total[i] += the 16 halves at address + 32 i, times factor."""

    def generate(context, builder, signature, args):
        out, address_, factor_ = args
        factor_ = splat(builder, factor_)
        for i in range(total.tokens):
            halves = extend_half(builder, load(builder, address_, ir.VectorType(I16, LANES), 32 * i))
            value = multiply_add(builder, halves, factor_, builder.extract_value(out, i))
            out = builder.insert_value(out, value, i)
        return out

    return total(total, types.int64, types.float32), generate
