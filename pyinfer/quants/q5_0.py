"""Q5_0: 32 elements in 22 bytes: half scale, 32 fifth bits, 16 bytes of nibbles; value = d (q - 16).

Codes go to 8 bits, where zero is 128: q + 112. Source: ggml-quants.c, dequantize_row_q5_0.
"""

from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import half_to_float, load_u16, load_u32
from pyinfer.names import GGMLType
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
