"""Random tensors of every GGUF type: quantized by the gguf package, or random blocks where it cannot."""

from __future__ import annotations

import gguf
import numpy as np

from pyinfer.gguf_file import Tensor
from pyinfer.names import BLOCK, GGMLType

# Byte offsets of the halves of a block, for types that the gguf package cannot quantize to.
HALVES = {"q2_k": (80, 82), "q3_k": (108,), "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,)}
# Their random codes are this many times larger than wanted.
SIZES = {"q2_k": 12.0, "q3_k": 40.0, "q4_k": 200.0, "q5_k": 400.0, "q6_k": 1200.0, "iq4_nl": 70.0}


def float_tensor(name: str, values: np.ndarray) -> Tensor:
    """An F32 tensor of a matrix [rows, columns] or vector."""
    data = np.ascontiguousarray(values, np.float32)
    return Tensor(name, tuple(reversed(data.shape)), GGMLType.F32, data.view(np.uint8).reshape(-1))


def random_tensor(name: str, kind: str, rows: int, columns: int, random: np.random.Generator) -> Tensor:
    """A matrix of a type, named as its file in pyinfer/quants, whose values are about one in size."""
    type_ = GGMLType[kind.upper()]
    if kind not in HALVES:
        values = random.standard_normal((rows, columns)).astype(np.float32)
        raw = gguf.quants.quantize(values, gguf.GGMLQuantizationType(int(type_)))
        return Tensor(name, (columns, rows), type_, np.ascontiguousarray(raw).view(np.uint8).reshape(-1))
    elements, size = BLOCK[type_]
    blocks = random.integers(0, 256, (rows * columns // elements, size), np.uint8)
    for offset in HALVES[kind]:
        halves = random.uniform(0.5, 1.5, len(blocks)) * random.choice([-1, 1], len(blocks)) / SIZES[kind]
        blocks[:, offset : offset + 2] = halves.astype(np.float16).view(np.uint8).reshape(-1, 2)
    return Tensor(name, (columns, rows), type_, blocks.reshape(-1))
