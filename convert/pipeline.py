"""From a source to a GGUF file: plan every tensor, then stream rows through the quantizers to the disk.

At no time more than one tensor and a few buffers are in memory; while one part is computed, the one before it
is written.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from pyinfer import names
from pyinfer.errors import FormatError
from pyinfer.jit.team import Team
from pyinfer.names import GGMLType
from pyinfer.quants.blocks import quantize_rows
from pyinfer.runtime.loader import default_threads
from pyinfer_convert.output import (
    BackgroundWriter,
    behind_links,
    check_space,
    check_target,
    remove_abandoned,
    replacing,
)
from pyinfer_convert.recipe import Choice, Quant, Recipe
from pyinfer_convert.sources import Source, SourceTensor
from pyinfer_convert.writer import TensorEntry, aligned, header

QUANTIZATION_VERSION = 2  # of ggml's block formats
PART_BYTES = 16 << 20  # read at once; the last-level cache holds what is computed and what is written
_KEPT = (GGMLType.F32, GGMLType.F16, GGMLType.BF16)  # copied by the kernels, which see what is not finite

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Planned:
    """One tensor of the new file."""

    source: SourceTensor
    choice: Choice

    @property
    def entry(self) -> TensorEntry:
        return TensorEntry(self.source.name, self.source.shape, self.choice.type)


@dataclass(frozen=True)
class Plan:
    """What a conversion will write."""

    source: Source
    quant: Quant
    tensors: list[Planned]
    header: bytes
    alignment: int

    @property
    def bytes_before(self) -> int:
        """Bytes of the tensors as they are stored now."""
        return sum(each.source.nbytes for each in self.tensors)

    @property
    def bytes_after(self) -> int:
        """Bytes of the tensors in the new file."""
        return sum(each.entry.nbytes for each in self.tensors)

    @property
    def file_bytes(self) -> int:
        return len(self.header) + sum(aligned(each.entry.nbytes, self.alignment) for each in self.tensors)

    def by_type(self) -> dict[str, tuple[int, int]]:
        """Number and bytes of the tensors of each type in the new file."""
        found: dict[str, tuple[int, int]] = {}
        for each in self.tensors:
            count, n_bytes = found.get(each.choice.type.name, (0, 0))
            found[each.choice.type.name] = count + 1, n_bytes + each.entry.nbytes
        return found

    def fallbacks(self) -> dict[tuple[str, str, int], int]:
        """How many tensors got another type than the recipe wants: by (wanted, got, columns)."""
        found: dict[tuple[str, str, int], int] = {}
        for each in self.tensors:
            if each.choice.fallback is not None:
                key = each.choice.fallback.name, each.choice.type.name, each.source.columns
                found[key] = found.get(key, 0) + 1
        return found


@dataclass(frozen=True)
class Summary:
    """A file that was written: bytes of tensor data before and after, and tensors of each type."""

    path: Path
    bytes_before: int
    bytes_after: int
    file_bytes: int
    seconds: float
    tensors: dict[str, int] = field(default_factory=dict)


def plan(
    source: Source,
    quant: Quant,
    *,
    output_type: GGMLType | None = None,
    predictor_type: GGMLType | None = None,
    magic: bytes = names.MAGIC,
) -> Plan:
    """Choose the type of every tensor. Raises what the source's metadata and tensors raise."""
    tensors = source.tensors()
    found = [each.name for each in tensors]
    if not found:
        raise FormatError(f"{source.label}: there is no tensor in it, expected the weights of a model")
    recipe = Recipe(quant, found, output_type=output_type, predictor_type=predictor_type)
    planned = [Planned(each, recipe.choose(each.name, each.shape, each.type)) for each in tensors]
    metadata = source.metadata()
    metadata[names.FILE_TYPE] = quant.file_type
    metadata[names.QUANTIZATION_VERSION] = QUANTIZATION_VERSION
    alignment = metadata.get(names.ALIGNMENT, names.DEFAULT_ALIGNMENT)
    assert isinstance(alignment, int)
    head = header(metadata, (each.entry for each in planned), alignment, magic)
    return Plan(source, quant, planned, head, alignment)


def check(plan: Plan, target: str | os.PathLike[str], *, force: bool = False) -> None:
    """Raises what `write` would raise about the target before it writes: InputError, CapacityError."""
    check_target(Path(target), plan.source.files, force)
    check_space(Path(target), plan.file_bytes)


def write(
    plan: Plan,
    target: str | os.PathLike[str],
    *,
    force: bool = False,
    n_threads: int | None = None,
    progress: Progress | None = None,
) -> Summary:
    """Write the file, which appears under its name only when it is complete. A link is followed and stays.

    force : replace an existing file;  progress : called with (bytes read, bytes to read)
    raises InputError (the target), CapacityError (no space), FormatError (weights that are not finite)
    """
    began = time.monotonic()
    check(plan, target, force=force)
    target = behind_links(Path(target))
    remove_abandoned(target)
    team = Team(n_threads or default_threads())
    try:
        with replacing(target, force) as file:
            file.write(plan.header)
            with BackgroundWriter(file, _buffer_bytes(plan)) as writer:
                _stream(plan, writer, team, progress)
    finally:
        team.close()
    counts = {kind: count for kind, (count, _) in plan.by_type().items()}
    seconds = time.monotonic() - began
    return Summary(target, plan.bytes_before, plan.bytes_after, plan.file_bytes, seconds, counts)


def _parts(tensor: SourceTensor) -> Iterator[slice]:
    step = max(1, PART_BYTES // max(1, tensor.nbytes // max(1, tensor.rows)))
    for first in range(0, tensor.rows, step):
        yield slice(first, min(first + step, tensor.rows))


def _buffer_bytes(plan: Plan) -> int:
    most = 0
    for each in plan.tensors:
        part = next(_parts(each.source), slice(0, 0))
        most = max(most, each.entry.nbytes // max(1, each.source.rows) * part.stop)
    return most + plan.alignment


def _stream(plan: Plan, writer: BackgroundWriter, team: Team, progress: Progress | None) -> None:
    done, total = 0, plan.bytes_before
    for each in plan.tensors:
        row_bytes = each.entry.nbytes // max(1, each.source.rows)
        for part in _parts(each.source):
            buffer = writer.buffer()
            n_bytes = row_bytes * (part.stop - part.start)
            _convert(plan, each, part, buffer[:n_bytes], team)
            if part.stop == each.source.rows:
                padding = -each.entry.nbytes % plan.alignment
                buffer[n_bytes : n_bytes + padding] = 0
                n_bytes += padding
            writer.put(buffer, n_bytes)
            if progress:
                progress(done + each.source.nbytes * part.stop // each.source.rows, total)
        done += each.source.nbytes
        each.source.done()


def _convert(plan: Plan, planned: Planned, part: slice, out: np.ndarray, team: Team) -> None:
    tensor, type_ = planned.source, planned.choice.type
    if tensor.raw is not None and tensor.type == type_ and type_ not in _KEPT:
        out[:] = tensor.raw(part).reshape(-1)
        return
    values = np.ascontiguousarray(tensor.load(part))
    name = f"{plan.source.label}: {tensor.name}"
    quantize_rows(type_, values, out, team, name=name, first_row=part.start)
