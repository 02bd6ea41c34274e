"""Q5_K: 256 elements in 176 bytes: as Q4_K, with 32 bytes of fifth bits before the nibbles; value = d s q -
dmin m.

Source: ggml-quants.c, dequantize_row_q5_K.
"""

from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import load_u32
from pyinfer.names import GGMLType
from pyinfer.quants.panels import U8M, pack_codes
from pyinfer.quants.q4_k import minimum, nibbles, scale

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q5_K, U8M, 256, 176


@inline
def quad(block, i):
    fifth = (load_u32(block + 16 + 4 * (i % 8)) >> (i // 8)) & 0x01010101
    return nibbles(block + 48, i) | (fifth << 4)


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, minimum, (256, 176, 8, 32), operands, first, last)
