"""Its place in the tree puts this folder on the import path, for the modules that tests share
(toy_engine.py, golden_files.py).
"""

from __future__ import annotations

import pytest
from golden_files import Golden, load_golden

from pyinfer.model_store import find_model


@pytest.fixture(scope="session")
def golden():
    """golden(name): a tiny model of tests/golden with its tokens and the logits of transformers."""

    def load(name: str) -> Golden:
        return load_golden(name)

    return load


@pytest.fixture(scope="session")
def smollm2_path():
    """SmolLM2-135M-Instruct, fetched once into the user's cache folder."""
    return find_model("smollm2-135m")
