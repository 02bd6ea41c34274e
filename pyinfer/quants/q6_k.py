"""Q6_K: 256 elements in 210 bytes: 128 of low nibbles, 64 of high pairs, 16 signed scales, half d.

value = d s (q - 32) in groups of 16; kept as 8-bit codes q + 96. Source: ggml-quants.c, dequantize_row_q6_K.
"""

from numpy import float32

from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import half_to_float, i8_at, load_u16, load_u32
from pyinfer.names import GGMLType
from pyinfer.quants.panels import U8G16, pack_codes

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q6_K, U8G16, 256, 210


@inline
def quad(block, i):
    half, run, at = i // 32, i % 32 // 8, 4 * (i % 8)
    low = (load_u32(block + 64 * half + 32 * (run % 2) + at) >> (4 * (run // 2))) & 0x0F0F0F0F
    high = (load_u32(block + 128 + 32 * half + at) >> (2 * run)) & 0x03030303
    return (low | (high << 4)) + 0x60606060


@inline
def scale(block, g):
    return half_to_float(load_u16(block + 208)) * float32(i8_at(block + 192)[g])


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, None, (256, 210, 8, 16), operands, first, last)
