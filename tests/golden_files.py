"""The tiny models of tests/golden: their files, tokens and right logits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import gguf
import numpy as np

from pyinfer.gguf_file import Tensor, open_gguf
from pyinfer.models import build_program
from pyinfer.program.reference import Reference

FOLDER = Path(__file__).resolve().parent / "golden"
NAMES = sorted(path.stem for path in FOLDER.glob("*.gguf"))


@dataclass(frozen=True)
class Golden:
    """tokens int [T]; logits float32 [T, V] by transformers."""

    path: Path
    tokens: np.ndarray
    logits: np.ndarray


@cache
def load_golden(name: str) -> Golden:
    path = FOLDER / f"{name}.gguf"
    stored = np.load(path.with_suffix(".npz"))
    return Golden(path, stored["tokens"], stored["logits"])


def dequantize(tensor: Tensor) -> np.ndarray:
    """float64 [rows, columns] (or [n]) by the gguf package, which shares no code with pyinfer."""
    kind = gguf.GGMLQuantizationType(int(tensor.type))
    shape = tuple(reversed(tensor.shape))
    if kind == gguf.GGMLQuantizationType.F32:
        return np.frombuffer(tensor.data, np.float32).reshape(shape).astype(np.float64)
    raw = np.frombuffer(tensor.data, np.uint8).reshape(*shape[:-1], -1)
    return gguf.quants.dequantize(raw, kind).reshape(shape).astype(np.float64)


def reference_logits(path: Path, tokens, n_ctx: int = 64) -> np.ndarray:
    """float64 [T, V] of the reference executor."""
    with open_gguf(path) as file:
        reference = Reference(build_program(file)[1], dequantize)
        n = len(tokens)
        return reference.step(tokens, np.arange(n), np.zeros(n, int), np.arange(n))
