"""Q8_0: 32 elements in 34 bytes: half scale, 32 signed bytes; value = d q.

Codes are kept unsigned: q + 128. Source: ggml-quants.c, dequantize_row_q8_0.
"""

from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import half_to_float, load_u16, load_u32
from pyinfer.names import GGMLType
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
