"""A whole model at every SIMD level that this processor has."""

from __future__ import annotations

import numpy as np
import pytest
from sparse_files import random_predictors, sparse_gguf

from pyinfer import names
from pyinfer.jit import levels
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer_tools.random_model import SHAPES, write_random_model

KEYS: dict[str, object] = {names.POWERINFER_SPARSE_THRESHOLD: 0.25}
TOKENS = np.random.default_rng(1).integers(3, 500, 14)


def logits(path, level: str) -> np.ndarray:
    """Prefill, single steps and a few rows: every class of kernels."""
    before = levels.level.get()
    levels.level.set(level)
    try:
        with load_model(path) as model:
            session = Session(model, 32, 2)
            parts = [
                session.prefill(part, all_logits=True) for part in (TOKENS[:9], TOKENS[9:10], TOKENS[10:])
            ]
            session.close()
        return np.concatenate(parts)
    finally:
        levels.level.set(before)


# 4-bit without and with minimum and 8-bit codes, which is every call of the integer dot product; no codes.
@pytest.mark.parametrize("quant", ["q4_0", "q5_1", "f32"])
def test_levels_agree(quant, tmp_path):
    path = tmp_path / "model.gguf"
    write_random_model(path, SHAPES["tiny"], quant)
    expected = logits(path, "portable")
    assert np.isfinite(expected).all() and expected.std() > 0.1
    for level in levels.available()[:-1]:
        np.testing.assert_array_equal(logits(path, level), expected, err_msg=level)


def sparse_logits(path, level: str, sparsity: str) -> np.ndarray:
    """Many rows, one, few, through linears that skip neurons."""
    before = levels.level.get()
    levels.level.set(level)
    try:
        with load_model(path, sparsity=sparsity) as model:
            session = Session(model, 64, 2)
            tokens = TOKENS % 60 + 3
            parts = [session.prefill(np.tile(tokens, 2), all_logits=True)]
            parts += [session.prefill(tokens[:n], all_logits=True) for n in (1, 4, 7)]
            session.close()
        return np.concatenate(parts)
    finally:
        levels.level.set(before)


@pytest.mark.parametrize(("quant", "sparsity"), [("q4_0", "exact"), ("q5_1", "exact"), ("q8_0", "predicted")])
def test_levels_agree_on_sparse_models(quant, sparsity, tmp_path):
    path = sparse_gguf(tmp_path / "model.gguf", "relu_llama", quant, random_predictors("relu_llama"), KEYS)
    expected = sparse_logits(path, "portable", sparsity)
    assert np.isfinite(expected).all() and expected.std() > 0.1
    for level in levels.available()[:-1]:
        np.testing.assert_array_equal(sparse_logits(path, level, sparsity), expected, err_msg=level)
