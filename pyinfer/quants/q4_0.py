"""Q4_0: 32 elements in 18 bytes: half scale, 16 bytes of nibbles (elements 0-15 low, 16-31 high); value = d
(q - 8).

Source: ggml-quants.c, dequantize_row_q4_0.
"""

from numpy import float32, int32

from pyinfer.jit.exact import (
    at_most_i32x16,
    exact,
    first_largest,
    magnitude_bits,
    nibble_pairs,
    store_u16,
    truncate_i32x16,
)
from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import float_to_half, half_to_float, load_u16, load_u32
from pyinfer.jit.simd import add_f32x16, mul_f32x16, splat_f32x16, store_i8x16
from pyinfer.names import GGMLType
from pyinfer.quants.blocks import each_block, reciprocal, status_of
from pyinfer.quants.panels import U4, pack_codes

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q4_0, U4, 32, 18


@inline
def quad(block, i):
    return (load_u32(block + 2 + 4 * (i % 4)) >> (4 * (i // 4))) & 0x0F0F0F0F


@inline
def scale(block, g):
    return half_to_float(load_u16(block))


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, None, (32, 18, 4, 32), operands, first, last)


@exact
def quantize_block(a, b, block):
    largest = first_largest(a, b)
    scale_ = largest * float32(-0.125)
    inverse, middle = splat_f32x16(reciprocal(scale_)), splat_f32x16(float32(8.5))
    low = at_most_i32x16(truncate_i32x16(add_f32x16(mul_f32x16(a, inverse), middle)), int32(15))
    high = at_most_i32x16(truncate_i32x16(add_f32x16(mul_f32x16(b, inverse), middle)), int32(15))
    half = float_to_half(scale_)
    store_u16(block, half)
    store_i8x16(block + 2, nibble_pairs(low, high))
    return status_of(magnitude_bits(a, b), half)


@kernel
def quantize(operands, step, first, last, thread):
    each_block(quantize_block, 18, operands, (first, last), thread)
