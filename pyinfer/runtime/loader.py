"""Open a model: file, hyperparameters, program, tokenizer, and weights in runtime layouts."""

from __future__ import annotations

import contextlib
import os
from functools import cached_property
from pathlib import Path

from pyinfer import config
from pyinfer.cpu.weights import Progress, Weights
from pyinfer.gguf_file import GGUFFile, open_gguf
from pyinfer.jit.team import MOST_THREADS, Team
from pyinfer.models import build_program
from pyinfer.neurons.sparsity import plan_ffn
from pyinfer.text.tokenizer import Tokenizer

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")  # microseconds of processor time per period, of a container


def default_threads() -> int:
    """PYINFER_THREADS, or the processors that this process may use."""
    asked = config.threads()
    if asked is not None:
        return asked
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = CGROUP_QUOTA.read_text(encoding="ascii").split()
        if quota != "max":
            usable = min(usable, -(-int(quota) // int(period)))
    return max(1, min(usable, MOST_THREADS - 1))


class Model:
    """An open model; sessions share it. Close it after them."""

    def __init__(
        self,
        file: GGUFFile,
        team: Team,
        progress: Progress | None = None,
        sparsity: str = "auto",
        observe: str | None = None,
    ) -> None:
        self.file = file
        self.plan, self.notices = plan_ffn(file, lambda plan: build_program(file, plan)[1], sparsity, observe)
        self.hparams, self.program = build_program(file, self.plan)
        self.weights = Weights(self.program, file, team, progress)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        return Tokenizer.from_metadata(self.file.metadata)

    def close(self) -> None:
        self.file.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def load_model(
    path: str | Path,
    *,
    progress: Progress | None = None,
    sparsity: str = "auto",
    observe: str | None = None,
) -> Model:
    """Read a GGUF file. Raises FormatError, UnsupportedError, ModelNotFoundError or CapacityError;
    progress(done, total) in bytes.

    sparsity : auto, exact, predicted, cats=SHARE or dense; InputError when the model cannot do it. What the
        file has for it, but cannot be used, is one of `Model.notices`, and the model runs without.
    observe : fired, histogram or rows, for `Session.observed`: neurons are seen as they are, so every layer
        runs dense, and of `sparsity` only the spelling is checked; or stats, for `layer_stats`, of the
        layers as `sparsity` wants them
    """
    file = open_gguf(path)
    team = Team(default_threads())
    try:
        return Model(file, team, progress, sparsity, observe)
    except BaseException:
        file.close()
        raise
    finally:
        team.close()
