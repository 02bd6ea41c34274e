"""Every tensor type against the gguf package's own dequantization."""

import gguf
import numpy as np
import pytest

from pyinfer.jit.buffers import allocate
from pyinfer.names import GGMLType
from pyinfer.quants import names, panels, quant

K_QUANTS = ("q2_k", "q3_k", "q4_k", "q5_k", "q6_k")  # their group scale is a product, rounded to a half
# Least halves of blocks; with tiny ones all products are subnormal halves, with small ones some.
ORDINARY, SMALL, TINY = 0.01, 1e-6, 4e-8


def random_blocks(name, rows, columns, rng, least=ORDINARY):
    """Valid random bytes of a type: every code and scale occurs; halves are least to 10 least,
    of either sign.
    """
    type_ = gguf.GGMLQuantizationType[name.upper()]
    block, size = gguf.GGML_QUANT_SIZES[type_]
    if name in ("f32", "f16", "bf16"):
        values = rng.standard_normal((rows, columns)).astype(np.float32)
        if name == "bf16":
            return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(rows, -1)
        return values.astype(np.float16 if name == "f16" else np.float32).view(np.uint8).reshape(rows, -1)
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for offset in {
        "q4_1": (0, 2),
        "q5_1": (0, 2),
        "q2_k": (80, 82),
        "q3_k": (108,),
        "q4_k": (0, 2),
        "q5_k": (0, 2),
        "q6_k": (208,),
    }.get(name, (0,)):
        signs = rng.choice([-1, 1], raw.shape[:2])
        halves = (rng.uniform(least, 10 * least, raw.shape[:2]) * signs).astype(np.float16)
        raw[:, :, offset : offset + 2] = halves.view(np.uint8).reshape(*raw.shape[:2], 2)
    return raw.reshape(rows, -1)


def packed(name, raw, rows, columns):
    file = quant(GGMLType[name.upper()])
    source = np.ascontiguousarray(raw)
    target = allocate(file.LAYOUT.matrix_bytes(rows, columns))
    operands = np.array(
        [source.ctypes.data, target.ctypes.data, rows, columns, file.LAYOUT.panel_bytes(columns)]
    )
    import ctypes

    call = ctypes.CFUNCTYPE(None, *([ctypes.c_int64] * 5))(file.pack.address)
    call(operands.ctypes.data, 0, 0, panels.panels_of(rows), 0)
    return panels.values(file.LAYOUT, target, rows, columns)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("least", [ORDINARY, SMALL, TINY])
@pytest.mark.parametrize("rows", [16, 37])
def test_panels_equal_gguf(name, rows, least):
    rng = np.random.default_rng(7)
    columns = 512
    raw = random_blocks(name, rows, columns, rng, least)
    expected = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[name.upper()]).astype(np.float64)
    found = packed(name, raw, rows, columns)
    assert np.abs(expected).max() > 10 * least
    if name in K_QUANTS and least != TINY:
        largest = np.abs(expected).reshape(rows, -1, 256).max(2).repeat(256, 1)
        assert (np.abs(found - expected) <= largest * 2.0**-10).all()
    else:
        np.testing.assert_array_equal(found.astype(np.float32), expected.astype(np.float32))


def test_every_type_of_the_issue_is_there():
    assert set(names()) == set(
        [
            "f32",
            "f16",
            "bf16",
            "q4_0",
            "q4_1",
            "q5_0",
            "q5_1",
            "q8_0",
            "q2_k",
            "q3_k",
            "q4_k",
            "q5_k",
            "q6_k",
            "iq4_nl",
        ]
    )
