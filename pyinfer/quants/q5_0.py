"""Q5_0: 32 elements in 22 bytes: half scale, 32 fifth bits, 16 bytes of nibbles; value = d (q - 16).

Codes go to 8 bits, where zero is 128: q + 112. Source: ggml-quants.c, dequantize_row_q5_0.
"""

from numpy import float32, int32

from pyinfer.jit.exact import (
    at_most_i32x16,
    exact,
    fifth_bits_of_32,
    first_largest,
    magnitude_bits,
    nibble_pairs,
    store_u16,
    store_u32,
    truncate_i32x16,
)
from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import float_to_half, half_to_float, load_u16, load_u32
from pyinfer.jit.simd import add_f32x16, mul_f32x16, splat_f32x16, store_i8x16
from pyinfer.names import GGMLType
from pyinfer.quants.blocks import each_block, reciprocal, status_of
from pyinfer.quants.panels import U8, pack_codes

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q5_0, U8, 32, 22


@inline
def fifth_bits(bits, i):
    """Bits 4 i .. 4 i + 3 as bit 4 of four bytes."""
    return ((((bits >> (4 * i)) & 15) * 0x00204081) & 0x01010101) << 4


@inline
def quad(block, i):
    low = (load_u32(block + 6 + 4 * (i % 4)) >> (4 * (i // 4))) & 0x0F0F0F0F
    return (low | fifth_bits(load_u32(block + 2), i)) + 0x70707070


@inline
def scale(block, g):
    return half_to_float(load_u16(block))


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, None, (32, 22, 8, 32), operands, first, last)


@exact
def quantize_block(a, b, block):
    largest = first_largest(a, b)
    scale_ = largest * float32(-0.0625)
    inverse, middle = splat_f32x16(reciprocal(scale_)), splat_f32x16(float32(16.5))
    low = at_most_i32x16(truncate_i32x16(add_f32x16(mul_f32x16(a, inverse), middle)), int32(31))
    high = at_most_i32x16(truncate_i32x16(add_f32x16(mul_f32x16(b, inverse), middle)), int32(31))
    half = float_to_half(scale_)
    store_u16(block, half)
    store_u32(block + 2, fifth_bits_of_32(low, high))
    store_i8x16(block + 6, nibble_pairs(low, high))
    return status_of(magnitude_bits(a, b), half)


@kernel
def quantize(operands, step, first, last, thread):
    each_block(quantize_block, 22, operands, (first, last), thread)
