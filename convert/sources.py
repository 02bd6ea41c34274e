"""What a conversion reads from: a Hugging Face checkpoint through its family's file, or a GGUF.

A source shows its tensors with the names, shapes and order of the new file and loads rows of them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod
from pathlib import Path
from types import ModuleType
from typing import Protocol

import gguf
import numpy as np
from gguf import GGMLQuantizationType

from pyinfer import names
from pyinfer.errors import FormatError, InputError, UnsupportedError
from pyinfer.gguf_file import GGUFFile, Tensor, open_gguf
from pyinfer.models.checkpoint import TensorRule, bind, family_of, load
from pyinfer.names import BLOCK, GGMLType
from pyinfer_convert.checkpoint import Checkpoint, open_checkpoint
from pyinfer_convert.hub import SMALL_FILES
from pyinfer_convert.writer import read_encoded

ACTIVATION = names.PYINFER_PREFIX + "activation"
SPARSE = ("relu", "relu2", "drelu", "fatrelu")  # activations that are 0 for most neurons
# How ffn_down lies. USUAL: neuron by neuron where the activation is sparse, of a GGUF as it is; PLAIN: as
# llama.cpp has it, and no predictors; BY_NEURON: neuron by neuron (ffn_down_t), whatever the activation.
USUAL, PLAIN, BY_NEURON = "usual", "plain", "by neuron"
_FLOATS = {GGMLType.F32: np.dtype("<f4"), GGMLType.F16: np.dtype("<f2"), GGMLType.BF16: np.dtype("<u2")}
_STORED = {"F32": GGMLType.F32, "F64": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}
_OF_CHECKPOINTS = (".safetensors", ".bin", ".json", ".pt", ".pth")
NEURONS_TOGETHER = 32  # that are computed as one panel
_TILE = 64  # a square of 2-byte elements whose lines stay in the L1 cache

Loader = Callable[[slice], np.ndarray]


@dataclass(frozen=True)
class SourceTensor:
    """One tensor of the new file.

    shape : numpy order;  type : as stored now;  load(rows) -> [rows, columns] of float32, float16, or uint16
    for the bits of bfloat16;  raw : bytes of the rows as they are, where they need not be unpacked
    done : gives memory back when all rows were loaded
    """

    name: str
    shape: tuple[int, ...]
    type: GGMLType
    load: Loader
    raw: Loader | None = None
    done: Callable[[], None] = lambda: None

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes to be read."""
        elements, block_bytes = BLOCK[self.type]
        return prod(self.shape) // elements * block_bytes


class Source(Protocol):
    """label : for messages;  name : of the model;  files : what must not be overwritten
    notices : sentences that a person should read, of what is left out
    """

    label: str
    name: str
    files: list[Path]
    notices: list[str]

    def metadata(self) -> dict[str, object]: ...
    def tensors(self) -> list[SourceTensor]: ...
    def close(self) -> None: ...


def open_source(
    path_or_repo: str | os.PathLike[str],
    *,
    layout: str = USUAL,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """A GGUF file, the folder of a checkpoint, or `organisation/name` of Hugging Face.

    layout : of ffn_down: USUAL, PLAIN or BY_NEURON
    progress : called with (done_bytes, total_bytes) during a download
    """
    if not os.fspath(path_or_repo):
        raise InputError("the source is empty, expected a folder, organisation/name, or a GGUF file")
    path = Path(path_or_repo)
    if path.is_file() or path.suffix == ".gguf":
        _check_no_checkpoint(path)
        return GGUFSource(open_gguf(path), layout=layout)
    checkpoint = open_checkpoint(path_or_repo, progress=progress)
    source = CheckpointSource(checkpoint, layout=layout)
    source.notices += checkpoint.notices
    return source


def _check_no_checkpoint(path: Path) -> None:
    """Raises FormatError for a single file of a checkpoint, of which the folder is meant."""
    if path.suffix not in _OF_CHECKPOINTS and path.name not in SMALL_FILES:
        return
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError:
        return  # said by whoever opens the model
    if magic in (names.MAGIC, names.MAGIC_POWERINFER):
        return
    raise FormatError(
        f"{path}: this is one file of a checkpoint, expected the folder with all of them; "
        f"give {path.absolute().parent}"
    )


class GGUFSource:
    """The tensors of a GGUF, to be written with other types. layout : as for `open_source`"""

    def __init__(self, file: GGUFFile, *, layout: str = USUAL) -> None:
        self._file, self._layout = file, layout
        self.label = file.path.name
        self.name = file.path.stem
        self.files = [file.path]
        self.notices: list[str] = []

    def metadata(self) -> dict[str, object]:
        """All keys with their types on disk, but those of a split file."""
        found: dict[str, object] = dict(read_encoded(self._file.path))
        if names.ALIGNMENT in found:
            found[names.ALIGNMENT] = self._file.metadata[names.ALIGNMENT]
        if self._file.powerinfer and self._file.architecture != "bamboo":
            found.setdefault(ACTIVATION, "relu")  # what the magic PWRI says, and the new file's will not
        if self._layout == PLAIN:
            found.pop(names.POWERINFER_SPARSE_THRESHOLD, None)
        return {key: value for key, value in found.items() if not key.startswith("split.")}

    def tensors(self) -> list[SourceTensor]:
        """Raises InputError where BY_NEURON is asked for and cannot be."""
        found = [self._show(tensor) for tensor in self._file.tensors.values()]
        if self._layout == BY_NEURON:
            return _by_neuron(found, self.label)
        if self._layout == USUAL:
            return found
        return [
            _renamed(each, names.FFN_DOWN_T, names.FFN_DOWN)
            for each in found
            if not re.fullmatch(rf"blk\.\d+\.({names.FC1}|{names.FC2})\.\w+", each.name)
        ]

    def _show(self, tensor: Tensor) -> SourceTensor:
        rows = tensor.data.reshape(tensor.rows, -1)

        def load_rows(part: slice) -> np.ndarray:
            if tensor.type in _FLOATS:
                return rows[part].view(_FLOATS[tensor.type])
            try:
                values = gguf.quants.dequantize(rows[part], GGMLQuantizationType(tensor.type))
            except (NotImplementedError, ValueError) as error:  # ValueError: the gguf package is older
                raise UnsupportedError(
                    f"{self.label}: {tensor.name} has type {tensor.type.name}, which cannot be unpacked "
                    "here; start from a file of another type"
                ) from error
            return np.ascontiguousarray(values, np.float32)

        def raw(part: slice) -> np.ndarray:
            return rows[part]

        shape = tuple(reversed(tensor.shape))
        return SourceTensor(
            tensor.name, shape, tensor.type, load_rows, raw, lambda: self._file.drop_pages(tensor)
        )

    def close(self) -> None:
        self._file.close()


class CheckpointSource:
    """The tensors of a checkpoint under the names and in the order of its family.

    layout : as for `open_source`
    """

    def __init__(self, checkpoint: Checkpoint, *, layout: str = USUAL) -> None:
        self._checkpoint = checkpoint
        self._family = family_of(checkpoint.config)
        self.label = checkpoint.path.name
        self.name = _model_name(checkpoint)
        self.notices: list[str] = []
        folder = checkpoint.path
        self.files = [each for each in folder.iterdir() if each.is_file()] if folder.is_dir() else []
        self._layout = layout

    def metadata(self) -> dict[str, object]:
        from pyinfer_convert.vocab import tokenizer_metadata

        architecture = self._family.__name__.rpartition(".")[2]
        embedding = names.weight(names.TOKEN_EMBD)
        rows = next((rule.shape[0] for rule in self._rules if rule.name == embedding), None)
        return {
            names.ARCHITECTURE: architecture,
            names.TYPE: "model",
            names.NAME: self.name,
            **self._family.metadata(self._checkpoint.config),
            **tokenizer_metadata(self._checkpoint, rows),
        }

    @cached_property
    def _rules(self) -> list[TensorRule]:
        return bind(self._family.tensors(self._checkpoint.config), self._checkpoint)

    def tensors(self) -> list[SourceTensor]:
        """Raises FormatError for a missing tensor or a wrong shape, UnsupportedError for one too many,
        InputError where BY_NEURON is asked for and cannot be.
        """
        found = [self._show(rule) for rule in self._rules]
        if self._layout == BY_NEURON:
            return _by_neuron(found, self.label)
        metadata = self._family.metadata(self._checkpoint.config)
        if self._layout == PLAIN or not _is_sparse(self._family, metadata):
            return found
        return [_renamed(each, names.FFN_DOWN, names.FFN_DOWN_T) for each in found]

    def _show(self, rule: TensorRule) -> SourceTensor:
        checkpoint, held = self._checkpoint, _Held()
        if len(rule.shape) < 2 or not rule.source:
            stored = GGMLType.F32
        else:
            stored = self._stored(rule.source)

        def load_rows(part: slice) -> np.ndarray:
            if rule.source and rule.transform is None and len(rule.shape) == 2:
                first = rule.rows.indices(checkpoint.shape(rule.source)[0])[0] if rule.rows else 0
                return checkpoint.read(rule.source, slice(first + part.start, first + part.stop))
            whole = held.get(part, prod(rule.shape[:-1]), lambda: load(rule, checkpoint))
            return whole.reshape(-1, rule.shape[-1])[part]

        return SourceTensor(rule.name, rule.shape, stored, load_rows)

    def _stored(self, source: str) -> GGMLType:
        dtype = self._checkpoint.dtype(source)
        if dtype not in _STORED:
            raise UnsupportedError(
                f"{self.label}: {source} is {dtype}, expected F32, F16 or BF16; "
                "convert from the original model"
            )
        return _STORED[dtype]

    def close(self) -> None:
        self._checkpoint.close()


class _Held:
    """A whole tensor between the first and the last part that is asked of it."""

    def __init__(self) -> None:
        self._whole: np.ndarray | None = None

    def get(self, part: slice, rows: int, make: Callable[[], np.ndarray]) -> np.ndarray:
        whole = make() if self._whole is None else self._whole
        self._whole = whole if part.stop < rows else None
        return whole


def _by_neuron(tensors: list[SourceTensor], label: str) -> list[SourceTensor]:
    """ffn_down of all layers as ffn_down_t, which a model can be run from when this says nothing."""
    found = [_renamed(each, names.FFN_DOWN, names.FFN_DOWN_T) for each in tensors]
    downs = [each for each in found if each.name.endswith(f".{names.FFN_DOWN_T}.weight")]
    if not downs:
        raise InputError(f"{label}: has no ffn_down to keep neuron by neuron; leave out --by-neuron")
    for each in downs:
        if each.rows % NEURONS_TOGETHER:
            raise InputError(
                f"{label}: its layers have {each.rows} neurons, expected a multiple of {NEURONS_TOGETHER} to "
                "keep them neuron by neuron; leave out --by-neuron"
            )
    return found


def _renamed(tensor: SourceTensor, old: str, new: str) -> SourceTensor:
    """ffn_down as ffn_down_t and back: transposed where it is a matrix; others as they are."""
    parts = tensor.name.split(".")
    if len(parts) < 2 or parts[-2] != old:
        return tensor
    parts[-2] = new
    return replace(_transposed(tensor) if len(tensor.shape) == 2 else tensor, name=".".join(parts))


def _transposed(tensor: SourceTensor) -> SourceTensor:
    """Rows for columns. Of ffn_down_t, as it is used neuron by neuron, one row is one neuron."""
    held = _Held()

    def load_rows(part: slice) -> np.ndarray:
        whole = held.get(part, tensor.columns, lambda: tensor.load(slice(0, tensor.rows)))
        given = whole[:, part]
        out = np.empty(given.shape[::-1], given.dtype)
        for i in range(0, given.shape[0], _TILE):
            for j in range(0, given.shape[1], _TILE):
                out[j : j + _TILE, i : i + _TILE] = given[i : i + _TILE, j : j + _TILE].T
        return out

    return replace(tensor, shape=tensor.shape[::-1], load=load_rows, raw=None)


def _is_sparse(family: ModuleType, metadata: dict[str, object]) -> bool:
    usual = getattr(family, "USUAL_ACTIVATION", None) or family.DECODER.activation
    return str(metadata.get(ACTIVATION, usual)).split(":")[0] in SPARSE


def _model_name(checkpoint: Checkpoint) -> str:
    given = checkpoint.config.get("_name_or_path")
    path = checkpoint.path.resolve()
    if path.parent.name == "snapshots":
        # the cache of huggingface_hub: models--organisation--name/snapshots/revision
        return path.parent.parent.name.rpartition("--")[2]
    return path.name or (given.rstrip("/").rpartition("/")[2] if isinstance(given, str) else "model")
