"""How far the cpu executor may be from the reference: normalized mean squared error, per op and layout.

What is float32 throughout is bounded by its additions. Layouts of K-quants round a group's scale to a half
(2^-11). Quantized linears round activations to 8 bits per 32: for normal numbers (2.1 / 127)^2 / 12 = 2.3e-5
on average; few outputs may be further off.
"""

from __future__ import annotations

import numpy as np

EXACT = 1e-12
K_SCALE = 2e-7
ACTIVATIONS = 1e-4

OPS = {
    "embed": EXACT,
    "rms_norm": EXACT,
    "rope": EXACT,
    "add": EXACT,
    "select": EXACT,
    "gate_relu": EXACT,
    "gate_silu": EXACT,
    "gate_gelu": EXACT,
    "attend": 1e-11,
    "attend_halves": 3e-7,  # keys and values are rounded to halves
}
# By tensor type; activations that 8 bits hold exactly.
LINEAR = {
    **dict.fromkeys(("f32", "f16", "bf16", "q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl"), EXACT),
    **dict.fromkeys(("q2_k", "q3_k", "q4_k", "q5_k", "q6_k"), K_SCALE),
}
FLOATS = ("f32", "f16", "bf16")


def linear_rounded(kind: str) -> float:
    """The bound for activations that must be rounded."""
    return LINEAR[kind] if kind in FLOATS else ACTIVATIONS


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    """Mean squared error over the mean square of what is expected; of zeros, exactly those."""
    error, size = ((found.astype(np.float64) - expected) ** 2).mean(), (expected**2).mean()
    return float(error / size) if size else float(0 if error == 0 else np.inf)
