"""BF16: kept as it is, 16 rows side by side."""

from pyinfer.jit.exact import exact, float_to_bfloat
from pyinfer.jit.kernel import kernel
from pyinfer.jit.memory import u16_at
from pyinfer.names import GGMLType
from pyinfer.quants.blocks import each_number
from pyinfer.quants.panels import BF16, pack_floats

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.BF16, BF16, 1, 2
LARGEST = 0x7F7F7FFF  # what would round to infinity lies above


@kernel
def pack(operands, step, first, last, thread):
    pack_floats(16, operands, first, last)


@exact
def write_number(address, k, number):
    u16_at(address)[k] = float_to_bfloat(number)


@kernel
def quantize(operands, step, first, last, thread):
    each_number(write_number, (2, LARGEST), operands, (first, last), thread)
