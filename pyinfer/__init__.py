"""Run GGUF language models fast on your own PC, in pure Python and Numba.

`from pyinfer import Llama` is all that an application needs; the heavy parts are imported when their names
are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pyinfer.errors import (
    CapacityError,
    ContextFullError,
    FormatError,
    InputError,
    MissingExtraError,
    ModelNotFoundError,
    PyInferError,
    UnsupportedError,
)

if TYPE_CHECKING:
    from pyinfer.gguf_file import GGUFFile, open_gguf
    from pyinfer.llama import Llama
    from pyinfer.model_store import find_model
    from pyinfer.runtime.sampler import SamplingParams
    from pyinfer.text.tokenizer import Tokenizer

__version__ = "0.1.0"

__all__ = [
    "CapacityError",
    "ContextFullError",
    "FormatError",
    "GGUFFile",
    "InputError",
    "Llama",
    "MissingExtraError",
    "ModelNotFoundError",
    "PyInferError",
    "SamplingParams",
    "Tokenizer",
    "UnsupportedError",
    "__version__",
    "find_model",
    "open_gguf",
]

_LAZY = {
    "GGUFFile": "pyinfer.gguf_file",
    "Llama": "pyinfer.llama",
    "SamplingParams": "pyinfer.runtime.sampler",
    "Tokenizer": "pyinfer.text.tokenizer",
    "find_model": "pyinfer.model_store",
    "open_gguf": "pyinfer.gguf_file",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
