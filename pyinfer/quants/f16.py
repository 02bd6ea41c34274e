"""F16: kept as it is, 16 rows side by side."""

from pyinfer.jit.exact import exact
from pyinfer.jit.kernel import kernel
from pyinfer.jit.memory import float_to_half, u16_at
from pyinfer.names import GGMLType
from pyinfer.quants.blocks import each_number
from pyinfer.quants.panels import F16, pack_floats

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.F16, F16, 1, 2
LARGEST = 0x477FEFFF  # just below 65520, where halves end


@kernel
def pack(operands, step, first, last, thread):
    pack_floats(16, operands, first, last)


@exact
def write_number(address, k, number):
    u16_at(address)[k] = float_to_half(number)


@kernel
def quantize(operands, step, first, last, thread):
    each_number(write_number, (2, LARGEST), operands, (first, last), thread)
