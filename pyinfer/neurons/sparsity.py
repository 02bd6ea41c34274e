"""Decides how every feed-forward layer of a model is computed, from what is asked and what the file has."""

from __future__ import annotations

import numpy as np

from pyinfer import names
from pyinfer.errors import InputError
from pyinfer.gguf_file import GGUFFile
from pyinfer.program.program import Program
from pyinfer.program.sparsity import DENSE, EXACT, OBSERVED, FFNPlan, LayerPlan

ZEROING = ("relu", "relu2", "fatrelu", "drelu")  # activations that are exactly 0 for many neurons


def activation_of(program: Program) -> str:
    """The activation of the feed-forward layers of a dense program, without its threshold."""
    ops = [op for op in program.ops if op.name in ("gate", "activate")]
    return ops[-1].params["activation"].partition(":")[0] if ops else ""


def fires_rarely(program: Program) -> bool:
    """Whether the model's activation leaves most neurons at exactly 0 (ReLU and relatives)."""
    return activation_of(program) in ZEROING


def plan_ffn(
    file: GGUFFile, dense: Program, sparsity: str = "auto", observe: str | None = None
) -> tuple[FFNPlan, list[str]]:
    """The plan, and sentences that the user should read.

    `dense` is the program without a plan. Raises InputError for a sparsity that this model cannot have.
    """
    if observe is not None and observe not in OBSERVED:
        raise InputError(f"observe is {observe!r}, expected one of {', '.join(OBSERVED)}")
    n_layers = dense.cache.layers
    if observe is not None or sparsity == DENSE:
        return FFNPlan(observe=observe), []
    if sparsity == "exact" or (
        sparsity == "auto" and fires_rarely(dense) and names.weight(names.FFN_DOWN_T, 0) in file.tensors
    ):
        return FFNPlan((LayerPlan(EXACT),) * n_layers), []
    return FFNPlan(), []
