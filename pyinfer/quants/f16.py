"""F16: kept as it is, 16 rows side by side."""

from pyinfer.jit.kernel import kernel
from pyinfer.names import GGMLType
from pyinfer.quants.panels import F16, pack_floats

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.F16, F16, 1, 2


@kernel
def pack(operands, step, first, last, thread):
    pack_floats(16, operands, first, last)
