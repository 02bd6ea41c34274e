"""Q3_K: 256 elements in 110 bytes: 32 bytes of third bits, 64 of 2-bit codes, 12 of sixteen 6-bit scales,
half d.

value = d (s - 32) (q - 4) in groups of 16; kept as 4-bit codes q + 4. Source: ggml-quants.c,
dequantize_row_q3_K.
"""

from numpy import float32

from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import half_to_float, load_u16, load_u32, u8_at
from pyinfer.names import GGMLType
from pyinfer.quants.panels import U4G16, pack_codes
from pyinfer.quants.q2_k import two_bits

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q3_K, U4G16, 256, 110


@inline
def quad(block, i):
    third = (load_u32(block + 4 * (i % 8)) >> (i // 8)) & 0x01010101
    return (two_bits(block + 32, i) | (third << 2)) + 0x04040404


@inline
def scale(block, g):
    packed = u8_at(block + 96)
    low = (packed[g % 8] >> (4 * (g // 8))) & 15
    high = (packed[8 + g % 4] >> (2 * (g // 4))) & 3
    return half_to_float(load_u16(block + 108)) * float32((low | (high << 4)) - 32)


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, None, (256, 110, 4, 16), operands, first, last)
