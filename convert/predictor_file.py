"""Write a model again with predictors in it: its tensors as they are, blk.N.fc1|fc2.weight behind them.

Of the section the profile is kept, which is about the same neurons; a placement is not, as predictors change
what fits its budget. The file appears under its name only when all of it, section included, is there.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pyinfer import names
from pyinfer.errors import FormatError
from pyinfer.gguf_file import GGUFFile
from pyinfer.names import GGMLType
from pyinfer.neurons.predictor import Predictors
from pyinfer.section import Entry, Section, read_section, write_section
from pyinfer_convert.output import behind_links, check_target, remove_abandoned
from pyinfer_convert.pipeline import Plan, Planned, write
from pyinfer_convert.predict import Layer, Matrix
from pyinfer_convert.recipe import QUANTS, Choice
from pyinfer_convert.sources import GGUFSource, SourceTensor
from pyinfer_convert.writer import header

KEPT_ENTRIES = ("profile", "thresholds")
_KEPT = "kept as it is"
_PREDICTORS = tuple(f".{part}.{kind}" for part in (names.FC1, names.FC2) for kind in ("weight", "bias"))


def with_predictors(file: GGUFFile, layers: Sequence[Layer]) -> Plan:
    """What will be written. A file of PowerInfer becomes a plain GGUF: its loader knows other predictors."""
    source = GGUFSource(file)
    kept = [each for each in source.tensors() if not each.name.endswith(_PREDICTORS)]
    planned = [Planned(each, Choice(each.type, _KEPT)) for each in kept]
    for index, layer in enumerate(layers):
        for part, matrix in ((names.FC1, layer.fc1), (names.FC2, layer.fc2)):
            planned.append(Planned(_shown(names.weight(part, index), matrix), Choice(matrix.type, _KEPT)))
    metadata = source.metadata()
    metadata.pop(names.POWERINFER_SPARSE_THRESHOLD, None)
    alignment = metadata.get(names.ALIGNMENT, names.DEFAULT_ALIGNMENT)
    assert isinstance(alignment, int)
    head = header(metadata, (each.entry for each in planned), alignment)
    return Plan(source, QUANTS["f32"], planned, head, alignment)  # the quant is for messages only


def _shown(name: str, matrix: Matrix) -> SourceTensor:
    def raw(part: slice) -> np.ndarray:
        return matrix.packed[part]

    def load_rows(part: slice) -> np.ndarray:
        if matrix.type == GGMLType.F16:
            return matrix.packed[part].view(np.float16)
        return matrix.values[part]

    return SourceTensor(name, matrix.values.shape, matrix.type, load_rows, raw)


def kept_section(file: GGUFFile, layers: Sequence[Layer]) -> tuple[Section, list[str]]:
    """The section of the new file, and sentences about what of the old one is not in it."""
    predictors = Predictors(
        tuple(layer.quality for layer in layers), np.stack([layer.thresholds for layer in layers])
    )
    entries: dict[str, Entry] = {}
    notices = []
    try:
        found = read_section(file)
    except FormatError as error:
        found = None
        notices.append(f"{error}; the new file has none of it")
    if found is not None:
        entries = {name: entry for name, entry in found.entries.items() if name in KEPT_ENTRIES}
        if any(name.startswith("placement") for name in found.entries):
            notices.append(
                "the placement is not in the new file, as predictors change what fits; run pyinfer-convert "
                "place again"
            )
    return Section({**entries, "predictors": predictors.to_entry()}), notices


def write_with_predictors(
    file: GGUFFile, layers: Sequence[Layer], target: Path, *, force: bool, threads: int | None, progress=None
) -> list[str]:
    """Write the new file; sentences that a person should read.

    raises InputError (the target), CapacityError (no space)
    """
    plan = with_predictors(file, layers)
    check_target(target, plan.source.files, force)
    section, notices = kept_section(file, layers)
    target = behind_links(target)
    remove_abandoned(target)
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.part")
    try:
        write(plan, unfinished, n_threads=threads, progress=progress)
        write_section(unfinished, section)
        os.replace(unfinished, target)
    finally:
        unfinished.unlink(missing_ok=True)
    return notices
