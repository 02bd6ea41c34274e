"""Q4_K: 256 elements in 144 bytes: half d, half dmin, 12 bytes of eight 6-bit (scale, minimum), 128 bytes of
nibbles.

value = d s q - dmin m in groups of 32. Source: ggml-quants.c, dequantize_row_q4_K and get_scale_min_k4.
"""

from numpy import float32

from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import half_to_float, load_u16, load_u32, u8_at
from pyinfer.names import GGMLType
from pyinfer.quants.panels import U4M, pack_codes

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q4_K, U4M, 256, 144


@inline
def nibbles(codes, i):
    """Elements 4 i .. 4 i + 3: each 32 bytes hold two groups of 32, low and high."""
    return (load_u32(codes + 32 * (i // 16) + 4 * (i % 8)) >> (4 * (i // 8 % 2))) & 0x0F0F0F0F


@inline
def six_bits(packed, g, k):
    """Scale (k = 0) or minimum (k = 1) of group g, from 12 bytes."""
    bytes_ = u8_at(packed)
    if g < 4:
        return bytes_[g + 4 * k] & 63
    return ((bytes_[g + 4] >> (4 * k)) & 15) | ((bytes_[g - 4 + 4 * k] >> 6) << 4)


@inline
def quad(block, i):
    return nibbles(block + 16, i)


@inline
def scale(block, g):
    return half_to_float(load_u16(block)) * float32(six_bits(block + 4, g, 0))


@inline
def minimum(block, g):
    return -half_to_float(load_u16(block + 2)) * float32(six_bits(block + 4, g, 1))


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, minimum, (256, 144, 4, 32), operands, first, last)
