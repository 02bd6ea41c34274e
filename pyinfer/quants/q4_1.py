"""Q4_1: 32 elements in 20 bytes: half scale, half minimum, 16 bytes of nibbles; value = d q + m.

Source: ggml-quants.c, dequantize_row_q4_1.
"""

from numpy import float32, int32

from pyinfer.jit.exact import (
    at_most_i32x16,
    exact,
    greatest_of_32,
    least_of_32,
    magnitude_bits,
    nibble_pairs,
    store_u16,
    sub_f32x16,
    truncate_i32x16,
)
from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import float_to_half, half_to_float, load_u16, load_u32
from pyinfer.jit.simd import add_f32x16, mul_f32x16, splat_f32x16, store_i8x16
from pyinfer.names import GGMLType
from pyinfer.quants.blocks import each_block, reciprocal, status_of
from pyinfer.quants.panels import U4M, pack_codes

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q4_1, U4M, 32, 20


@inline
def quad(block, i):
    return (load_u32(block + 4 + 4 * (i % 4)) >> (4 * (i // 4))) & 0x0F0F0F0F


@inline
def scale(block, g):
    return half_to_float(load_u16(block))


@inline
def minimum(block, g):
    return half_to_float(load_u16(block + 2))


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, minimum, (32, 20, 4, 32), operands, first, last)


@exact
def quantize_block(a, b, block):
    least = least_of_32(a, b)
    scale_ = (greatest_of_32(a, b) - least) / float32(15)
    inverse, start, middle = splat_f32x16(reciprocal(scale_)), splat_f32x16(least), splat_f32x16(float32(0.5))
    low = add_f32x16(mul_f32x16(sub_f32x16(a, start), inverse), middle)
    high = add_f32x16(mul_f32x16(sub_f32x16(b, start), inverse), middle)
    low = at_most_i32x16(truncate_i32x16(low), int32(15))
    high = at_most_i32x16(truncate_i32x16(high), int32(15))
    half, half_least = float_to_half(scale_), float_to_half(least)
    store_u16(block, half)
    store_u16(block + 2, half_least)
    store_i8x16(block + 4, nibble_pairs(low, high))
    most = magnitude_bits(a, b)
    return status_of(most, half) | status_of(most, half_least)


@kernel
def quantize(operands, step, first, last, thread):
    each_block(quantize_block, 20, operands, (first, last), thread)
