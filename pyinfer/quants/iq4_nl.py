"""IQ4_NL: 32 elements in 18 bytes, as Q4_0, but a nibble names one of 16 uneven levels; value = d LEVELS[q].

Codes go to 8 bits as the level + 128. Source: ggml-common.h, kvalues_iq4nl.
"""

import numpy as np

from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import half_to_float, load_u16, load_u32
from pyinfer.names import GGMLType
from pyinfer.quants.panels import U8, pack_codes

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.IQ4_NL, U8, 32, 18
LEVELS = np.array([1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241], np.uint32)


@inline
def quad(block, i):
    nibbles = (load_u32(block + 2 + 4 * (i % 4)) >> (4 * (i // 4))) & 0x0F0F0F0F
    codes = LEVELS[nibbles & 15] | (LEVELS[(nibbles >> 8) & 15] << 8)
    return codes | (LEVELS[(nibbles >> 16) & 15] << 16) | (LEVELS[(nibbles >> 24) & 15] << 24)


@inline
def scale(block, g):
    return half_to_float(load_u16(block))


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, None, (32, 18, 8, 32), operands, first, last)
