"""Q8_0: 32 elements in 34 bytes: half scale, 32 signed bytes; value = d q.

Codes are kept unsigned: q + 128. Source: ggml-quants.c, dequantize_row_q8_0.
"""

from numpy import float32

from pyinfer.jit.exact import exact, magnitude_bits, round_away_i32x16, store_u16
from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import bits_to_float, float_to_half, half_to_float, load_u16, load_u32
from pyinfer.jit.simd import mul_f32x16, splat_f32x16, store_i8x16
from pyinfer.names import GGMLType
from pyinfer.quants.blocks import each_block, reciprocal, status_of
from pyinfer.quants.panels import U8, pack_codes

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q8_0, U8, 32, 34


@inline
def quad(block, i):
    return load_u32(block + 2 + 4 * i) ^ 0x80808080


@inline
def scale(block, g):
    return half_to_float(load_u16(block))


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, None, (32, 34, 8, 32), operands, first, last)


@exact
def quantize_block(a, b, block):
    most = magnitude_bits(a, b)
    scale_ = bits_to_float(most) / float32(127)
    inverse = splat_f32x16(reciprocal(scale_))
    half = float_to_half(scale_)
    store_u16(block, half)
    store_i8x16(block + 2, round_away_i32x16(mul_f32x16(a, inverse)))
    store_i8x16(block + 18, round_away_i32x16(mul_f32x16(b, inverse)))
    return status_of(most, half)


@kernel
def quantize(operands, step, first, last, thread):
    each_block(quantize_block, 34, operands, (first, last), thread)
