"""F32: kept as it is, 16 rows side by side."""

from pyinfer.jit.kernel import kernel
from pyinfer.names import GGMLType
from pyinfer.quants.panels import F32, pack_floats

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.F32, F32, 1, 4


@kernel
def pack(operands, step, first, last, thread):
    pack_floats(32, operands, first, last)
