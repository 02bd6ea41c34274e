"""F32: kept as it is, 16 rows side by side."""

from pyinfer.jit.exact import exact
from pyinfer.jit.kernel import kernel
from pyinfer.jit.memory import f32_at
from pyinfer.names import GGMLType
from pyinfer.quants.blocks import each_number
from pyinfer.quants.panels import F32, pack_floats

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.F32, F32, 1, 4
LARGEST = 0x7F7FFFFF


@kernel
def pack(operands, step, first, last, thread):
    pack_floats(32, operands, first, last)


@exact
def write_number(address, k, number):
    f32_at(address)[k] = number


@kernel
def quantize(operands, step, first, last, thread):
    each_number(write_number, (4, LARGEST), operands, (first, last), thread)
