"""What a conversion reads from: a Hugging Face checkpoint through its family's file, or a GGUF.

A source shows its tensors with the names, shapes and order of the new file and loads rows of them.
"""

from __future__ import annotations

import os
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
from pyinfer.errors import UnsupportedError
from pyinfer.gguf_file import GGUFFile, Tensor, open_gguf
from pyinfer.models.checkpoint import TensorRule, bind, family_of, load
from pyinfer.names import BLOCK, GGMLType
from pyinfer_convert.checkpoint import Checkpoint, open_checkpoint
from pyinfer_convert.writer import read_encoded

ACTIVATION = names.PYINFER_PREFIX + "activation"
SPARSE = ("relu", "relu2", "drelu", "fatrelu")  # activations that are 0 for most neurons
_FLOATS = {GGMLType.F32: np.dtype("<f4"), GGMLType.F16: np.dtype("<f2"), GGMLType.BF16: np.dtype("<u2")}
_STORED = {"F32": GGMLType.F32, "F64": GGMLType.F32, "F16": GGMLType.F16, "BF16": GGMLType.BF16}
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
    """label : for messages;  name : of the model;  files : what must not be overwritten."""

    label: str
    name: str
    files: list[Path]

    def metadata(self) -> dict[str, object]: ...
    def tensors(self) -> list[SourceTensor]: ...
    def close(self) -> None: ...


def open_source(
    path_or_repo: str | os.PathLike[str],
    *,
    plain: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Source:
    """A GGUF file, the folder of a checkpoint, or `organisation/name` of Hugging Face.

    plain : keep ffn_down as llama.cpp has it, also where the activation is sparse
    progress : called with (done_bytes, total_bytes) during a download
    """
    path = Path(path_or_repo)
    if path.is_file() or path.suffix == ".gguf":
        return GGUFSource(open_gguf(path))
    return CheckpointSource(open_checkpoint(path_or_repo, progress=progress), plain=plain)


class GGUFSource:
    """The tensors of a GGUF, to be written with other types."""

    def __init__(self, file: GGUFFile) -> None:
        self._file = file
        self.label = file.path.name
        self.name = file.path.stem
        self.files = [file.path]

    def metadata(self) -> dict[str, object]:
        """All keys with their types on disk, but those of a split file."""
        found: dict[str, object] = dict(read_encoded(self._file.path))
        if names.ALIGNMENT in found:
            found[names.ALIGNMENT] = self._file.metadata[names.ALIGNMENT]
        if self._file.powerinfer and self._file.architecture != "bamboo":
            found.setdefault(ACTIVATION, "relu")  # what the magic PWRI says, and the new file's will not
        return {key: value for key, value in found.items() if not key.startswith("split.")}

    def tensors(self) -> list[SourceTensor]:
        return [self._show(tensor) for tensor in self._file.tensors.values()]

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
    """The tensors of a checkpoint under the names and in the order of its family."""

    def __init__(self, checkpoint: Checkpoint, *, plain: bool = False) -> None:
        self._checkpoint = checkpoint
        self._family = family_of(checkpoint.config)
        self.label = checkpoint.path.name
        self.name = _model_name(checkpoint)
        folder = checkpoint.path
        self.files = [each for each in folder.iterdir() if each.is_file()] if folder.is_dir() else []
        self._plain = plain

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
        """Raises FormatError for a missing tensor or a wrong shape, UnsupportedError for one too many."""
        config = self._checkpoint.config
        by_neuron = not self._plain and _is_sparse(self._family, self._family.metadata(config))
        found = []
        for rule in self._rules:
            tensor = self._show(rule)
            parts = tensor.name.split(".")
            if by_neuron and parts[-2] == names.FFN_DOWN:
                parts[-2] = names.FFN_DOWN_T
                tensor = _transposed(tensor) if len(tensor.shape) == 2 else tensor
                tensor = replace(tensor, name=".".join(parts))
            found.append(tensor)
        return found

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


def _transposed(tensor: SourceTensor) -> SourceTensor:
    """ffn_down as it is used neuron by neuron: one row is one neuron."""
    held = _Held()

    def load_rows(part: slice) -> np.ndarray:
        whole = held.get(part, tensor.columns, lambda: tensor.load(slice(0, tensor.rows)))
        given = whole[:, part]
        out = np.empty(given.shape[::-1], given.dtype)
        for i in range(0, given.shape[0], _TILE):
            for j in range(0, given.shape[1], _TILE):
                out[j : j + _TILE, i : i + _TILE] = given[i : i + _TILE, j : j + _TILE].T
        return out

    return SourceTensor(tensor.name, tensor.shape[::-1], tensor.type, load_rows)


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
