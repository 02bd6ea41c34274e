"""Model families: one file each, named as general.architecture says; a new file is a new family.

A file has hparams(file) -> HParams and build(builder, hparams, weights) -> Program, to run a GGUF; and
HF_ARCHITECTURES, metadata(config) and tensors(config), to make one of a Hugging Face checkpoint.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from pyinfer.errors import UnsupportedError
from pyinfer.gguf_file import GGUFFile
from pyinfer.models.agreement import check_agreement
from pyinfer.models.hparams import HParams
from pyinfer.program.builder import Builder, Weights
from pyinfer.program.program import Program
from pyinfer.program.sparsity import FFNPlan

# What families share.
_SHARED = ("agreement", "hparams", "checkpoint", "checkpoint_config", "checkpoint_decoder")


def names() -> list[str]:
    """Architectures that can be run."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _SHARED)


def build_program(file: GGUFFile, plan: FFNPlan | None = None) -> tuple[HParams, Program]:
    """Hyperparameters and program of an open file; `plan` says how its feed-forward layers are computed.

    Raises UnsupportedError that lists the known architectures, or names what the program would leave out;
    FormatError for what contradicts itself.
    """
    architecture = file.architecture
    if architecture not in names():
        raise UnsupportedError(
            f"{file.path}: architecture {architecture!r} is not supported; supported are {', '.join(names())}"
        )
    family = import_module(f"pyinfer.models.{architecture}")
    hp = family.hparams(file)
    program = family.build(Builder(file, plan), hp, Weights(file))
    check_agreement(file, hp, program)
    return hp, program


def program_text(file: GGUFFile) -> str:
    """The program of an open file, one operation per line."""
    return str(build_program(file)[1])
