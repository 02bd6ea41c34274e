"""The SIMD vocabulary on tiles: T vectors of 16 lanes, one per token (or attention entry) that shares a
load.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyinfer.jit.dots import dot
from pyinfer.jit.llvm import F32, I32, I64, TileType, f32x16, load, multiply_add, splat, store, u8x64


def _each(builder, tile, generate):
    for t in range(tile.type.count):
        tile = builder.insert_value(tile, generate(t, builder.extract_value(tile, t)), t)
    return tile


@intrinsic(prefer_literal=True)
def tile_zero(typingctx, tokens):
    """Float tile of zeros; `tokens` is a compile-time constant."""
    result = TileType("f32", tokens.literal_value)

    def generate(context, builder, signature, args):
        return ir.Constant(result.llvm, None)

    return result(tokens), generate


@intrinsic
def tile_tokens(typingctx, tile):
    """How many rows a tile has, a constant."""

    def generate(context, builder, signature, args):
        return I64(tile.tokens)

    return types.int64(tile), generate


@intrinsic
def tile_zero_i32(typingctx, like):
    """Integer tile of zeros, as many rows as the tile `like`."""
    result = TileType("i32", like.tokens)

    def generate(context, builder, signature, args):
        return ir.Constant(result.llvm, None)

    return result(like), generate


@intrinsic(prefer_literal=True)
def tile_splat_i32(typingctx, like, address, shift):
    """Integer tile whose row t is the int32 at address + 4 t, shifted left by `shift`, in all lanes; as many
    rows as the tile `like`.
    """
    result = TileType("i32", like.tokens)
    bits = shift.literal_value

    def generate(context, builder, signature, args):
        tile = ir.Constant(result.llvm, ir.Undefined)
        for t in range(result.tokens):
            value = load(builder, args[1], I32, 4 * t)
            tile = builder.insert_value(
                tile, splat(builder, builder.shl(value, I32(bits)) if bits else value), t
            )
        return tile

    return result(like, types.int64, shift), generate


@intrinsic(prefer_literal=True)
def tile_dot(typingctx, acc, codes, address, wide):
    """acc[t] += dot4(codes, the 4 int8 at address + 32 t in all lanes); wide: codes may exceed 127."""

    def generate(context, builder, signature, args):
        tile, codes_, address_, _ = args

        def step(t, value):
            x = builder.bitcast(splat(builder, load(builder, address_, I32, 32 * t)), u8x64.llvm)
            return dot(builder, value, codes_, x, bool(wide.literal_value))

        return _each(builder, tile, step)

    return acc(acc, u8x64, types.int64, wide), generate


@intrinsic
def tile_add_scaled(typingctx, total, acc, scale, address):
    """total[t] += float(acc[t]) * (scale * the float32 at address + 4 t)."""

    def generate(context, builder, signature, args):
        tile, integers, scale_, address_ = args

        def step(t, value):
            factor = builder.fmul(scale_, splat(builder, load(builder, address_, F32, 4 * t)))
            return multiply_add(
                builder, builder.sitofp(builder.extract_value(integers, t), f32x16.llvm), factor, value
            )

        return _each(builder, tile, step)

    return total(total, acc, f32x16, types.int64), generate


@intrinsic
def tile_add_product(typingctx, total, vector, address, stride):
    """total[t] += vector * the float32 at address + stride t, in all lanes."""

    def generate(context, builder, signature, args):
        tile, vector_, address_, stride_ = args

        def step(t, value):
            where = builder.add(address_, builder.mul(stride_, I64(t)))
            return multiply_add(builder, vector_, splat(builder, load(builder, where, F32)), value)

        return _each(builder, tile, step)

    return total(total, f32x16, types.int64, types.int64), generate


@intrinsic
def tile_store(typingctx, tile, address, stride):
    """Write row t of the tile to address + stride t."""

    def generate(context, builder, signature, args):
        for t in range(tile.tokens):
            where = builder.add(args[1], builder.mul(args[2], I64(t)))
            store(builder, builder.extract_value(args[0], t), where)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64), generate


@intrinsic
def tile_add_memory(typingctx, tile, address, stride):
    """tile[t] + the 16 float32 at address + stride t."""

    def generate(context, builder, signature, args):
        def step(t, value):
            where = builder.add(args[1], builder.mul(args[2], I64(t)))
            return builder.fadd(value, load(builder, where, f32x16.llvm))

        return _each(builder, args[0], step)

    return tile(tile, types.int64, types.int64), generate


@intrinsic
def tile_add_vector(typingctx, tile, vector):
    """tile[t] + vector for every t."""

    def generate(context, builder, signature, args):
        return _each(builder, args[0], lambda t, value: builder.fadd(value, args[1]))

    return tile(tile, f32x16), generate


@intrinsic
def tile_scale_rows(typingctx, tile, address):
    """tile[t] * the float32 at address + 4 t."""

    def generate(context, builder, signature, args):
        return _each(
            builder, args[0], lambda t, v: builder.fmul(v, splat(builder, load(builder, args[1], F32, 4 * t)))
        )

    return tile(tile, types.int64), generate


@intrinsic(prefer_literal=True)
def tile_load(typingctx, tokens, address, stride):
    """Float tile whose row t is at address + stride t."""
    result = TileType("f32", tokens.literal_value)

    def generate(context, builder, signature, args):
        tile = ir.Constant(result.llvm, ir.Undefined)
        for t in range(result.tokens):
            where = builder.add(args[1], builder.mul(args[2], I64(t)))
            tile = builder.insert_value(tile, load(builder, where, f32x16.llvm), t)
        return tile

    return result(tokens, types.int64, types.int64), generate
