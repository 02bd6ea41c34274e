"""qwen2: Qwen 2 and 2.5. As llama, but q, k and v have biases (found in the file) and rotation pairs
halves.
"""

from __future__ import annotations

from pyinfer.gguf_file import GGUFFile
from pyinfer.models.hparams import HParams, read_hparams
from pyinfer.models.llama import build

__all__ = ["build", "hparams"]


def hparams(file: GGUFFile) -> HParams:
    return read_hparams(file, neox=True)
