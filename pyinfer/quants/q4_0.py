"""Q4_0: 32 elements in 18 bytes: half scale, 16 bytes of nibbles (elements 0-15 low, 16-31 high); value = d
(q - 8).

Source: ggml-quants.c, dequantize_row_q4_0.
"""

from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import half_to_float, load_u16, load_u32
from pyinfer.names import GGMLType
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
