"""A Hugging Face checkpoint: configuration and tensors of a folder, or of a repository that is fetched first.

Tensors of all shards stand under one roof and are read one at a time, mapped into memory.

Source: transformers (file names, index files, text_config); peft (adapter_config.json).
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, KeysView
from pathlib import Path
from typing import Any

import numpy as np

from pyinfer.download import Progress
from pyinfer.errors import FormatError, ModelNotFoundError, PyInferError, UnsupportedError
from pyinfer.gguf_metadata import quoted
from pyinfer_convert.hub import fetch_repository, is_repository_name
from pyinfer_convert.safetensors_file import open_safetensors
from pyinfer_convert.tensor_file import StoredTensor, TensorFile
from pyinfer_convert.torch_file import open_torch_file
from pyinfer_convert.weight_files import INDEX_SUFFIX, find_weights

MAX_JSON_BYTES = 256 << 20
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")


class Checkpoint:
    """An open checkpoint.

    path : the folder;  config : config.json, with the text_config of a model that also sees laid over it
    generation_config : generation_config.json, or {};  notices : sentences on what is there but not read
    """

    def __init__(
        self, path: Path, config: dict[str, Any], files: Iterable[TensorFile], index: dict[str, str]
    ):
        self.path = path
        self.config = config
        self.generation_config = read_json(path / "generation_config.json") or {}
        self.notices = _notices(path)
        self._files = list(files)
        self._latest: TensorFile | None = None
        self._places: dict[str, tuple[TensorFile, StoredTensor]] = {}
        for file in self._files:
            for name, tensor in file.tensors.items():
                if index and index.get(name) != file.path.name:
                    continue
                if name in self._places:
                    raise FormatError(
                        f"{file.path.name}: tensor {quoted(name)} is in {self._places[name][0].path.name} too"
                    )
                self._places[name] = (file, tensor)
        absent = [name for name in index if name not in self._places]
        if absent:
            raise FormatError(
                f"{index[absent[0]]}: tensor {quoted(absent[0])} is missing, expected it as the index file "
                "says; fetch the files again"
            )

    @property
    def names(self) -> KeysView[str]:
        return self._places.keys()

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for _, tensor in self._places.values())

    def shape(self, name: str) -> tuple[int, ...]:
        return self._place(name)[1].shape

    def dtype(self, name: str) -> str:
        """The stored type: F32, F16, BF16, F64, I64 ... as safetensors names them."""
        return self._place(name)[1].dtype

    def read(self, name: str, rows: slice | None = None) -> np.ndarray:
        """A tensor, or a range of its rows, mapped and read-only; the next read may give back its memory.

        F16 and F32 as such, BF16 as uint16 with its raw bits, F64 as float32
        raises FormatError (no such tensor), UnsupportedError (8-bit floats and below)
        """
        file, tensor = self._place(name)
        if self._latest is not None and self._latest is not file:
            self._latest.give_back()
        self._latest = file
        return file.read(tensor.name, rows)

    def json(self, file: str) -> dict[str, Any] | None:
        """The object in a JSON file of the folder, None where there is no such file."""
        return read_json(self.path / file)

    def bytes(self, file: str) -> bytes | None:
        """The content of a small file of the folder, None where there is none."""
        return read_small(self.path / file)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _place(self, name: str) -> tuple[TensorFile, StoredTensor]:
        try:
            return self._places[name]
        except KeyError:
            raise FormatError(
                f"{self.path}: the checkpoint has no tensor {quoted(name)}, expected it in a complete model; "
                "fetch the files again"
            ) from None


def open_checkpoint(path_or_repo: str | os.PathLike[str], *, progress: Progress | None = None) -> Checkpoint:
    """Open a folder, or `organisation/name` or `organisation/name@revision` of Hugging Face.

    progress : called with (done_bytes, total_bytes) during a download
    raises ModelNotFoundError, FormatError, UnsupportedError, CapacityError, MissingExtraError

    >>> with open_checkpoint("stories15M") as checkpoint:  # doctest: +SKIP
    ...     checkpoint.dtype("model.norm.weight"), checkpoint.shape("model.norm.weight")
    ('F16', (288,))
    """
    path = Path(path_or_repo)
    if not path.exists() and is_repository_name(os.fspath(path_or_repo)):
        path = fetch_repository(os.fspath(path_or_repo), progress)
    if not path.exists():
        raise ModelNotFoundError(
            f"{path}: no such folder, expected a checkpoint's folder or organisation/name of Hugging Face"
        )
    if not path.is_dir():
        raise FormatError(
            f"{path}: this is a file, expected the folder of a checkpoint, with its config.json; "
            f"give {path.absolute().parent}"
        )
    return _open_folder(path)


def _open_folder(path: Path) -> Checkpoint:
    names = sorted(each.name for each in path.iterdir())
    weights = find_weights(names)
    if not weights.files and weights.index is None:
        raise _without_weights(path, names)
    config = read_json(path / "config.json")
    if config is None:
        raise FormatError(f"{path}: the folder has no config.json, expected one beside the weights")
    config = _text_config(config)
    _check_unquantized(path, config)
    index = _read_index(path, weights.index) if weights.index else {}
    needed = sorted(set(index.values())) if index else weights.files
    missing = [name for name in needed if not (path / name).is_file()]
    if missing:
        raise ModelNotFoundError(
            f"{path}: {len(missing)} of {len(needed)} weight files are missing ({', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}); fetch them again"
        )
    files: list[TensorFile] = []
    try:
        for name in needed:
            opened = open_safetensors if name.endswith(".safetensors") else open_torch_file
            files.append(opened(path / name))
        return Checkpoint(path, config, files, index)
    except BaseException:
        for file in files:
            file.close()
        raise


def _notices(path: Path) -> list[str]:
    adapter = [name for name in ADAPTER_FILES if (path / name).is_file()]
    if not adapter:
        return []
    return [
        f"{path}: the LoRA adapter in this folder ({adapter[0]}) is not merged into the model, only the base "
        "weights are converted; to have it, merge it first (merge_and_unload of peft, then save_pretrained)"
    ]


def _text_config(config: dict[str, Any]) -> dict[str, Any]:
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return config
    return {**config, **{key: value for key, value in inner.items() if value is not None}}


def _check_unquantized(path: Path, config: dict[str, Any]) -> None:
    quantization = config.get("quantization_config") or config.get("compression_config")
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        raise UnsupportedError(
            f"{path / 'config.json'}: the weights are quantized already ({str(method or 'by what?')[:40]}), "
            "expected F32, F16 or BF16; convert from the original model"
        )


def _read_index(path: Path, name: str) -> dict[str, str]:
    """Tensor name -> file name, of a file like model.safetensors.index.json."""
    places = (read_json(path / name) or {}).get("weight_map")
    if not isinstance(places, dict) or not places or not all(type(each) is str for each in places.values()):
        raise FormatError(f"{path / name}: weight_map is not an object of file names; fetch the file again")
    suffix = ".safetensors" if name.endswith(".safetensors" + INDEX_SUFFIX) else ".bin"
    for tensor, file in places.items():
        if not file.endswith(suffix) or re.search(r"[/\\:\0]", file):
            raise FormatError(
                f"{path / name}: tensor {quoted(tensor)} is said to be in {quoted(file)}, "
                f"expected the name of a *{suffix} file in this folder"
            )
    return places


def _without_weights(path: Path, names: list[str]) -> PyInferError:
    """Why a folder is no checkpoint, and what to do about it."""
    if any(name in names for name in ADAPTER_FILES):
        base = (read_json(path / "adapter_config.json") or {}).get("base_model_name_or_path", "another model")
        return UnsupportedError(
            f"{path}: this is a LoRA adapter of {quoted(str(base))}, not a model; merge it into that model "
            "first (merge_and_unload of peft, then save_pretrained) and convert the result"
        )
    gguf = [name for name in names if name.endswith(".gguf")]
    if gguf:
        return FormatError(
            f"{path}: holds GGUF files, not a checkpoint; give the file itself: {path / gguf[0]}"
        )
    other = [name for name in names if name.endswith((".h5", ".msgpack", ".onnx", ".pth", ".ckpt"))]
    if other:
        return UnsupportedError(
            f"{path}: holds {other[0]}, which pyinfer does not read; save the model again with "
            "save_pretrained of transformers, which writes model.safetensors"
        )
    return FormatError(
        f"{path}: the folder holds no weights, expected model.safetensors or pytorch_model.bin, or their "
        "shards with the index file"
    )


def read_small(path: Path) -> bytes | None:
    """The content of a file of at most 256 MiB; None where there is none."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_JSON_BYTES + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelNotFoundError(f"{path}: the file cannot be read ({error.strerror or error})") from None
    if len(data) > MAX_JSON_BYTES:
        raise FormatError(f"{path}: the file has more than {MAX_JSON_BYTES} bytes, expected a small one")
    if data[:23] == b"version https://git-lfs":
        raise FormatError(f"{path}: this is a Git LFS pointer; fetch the file itself with `git lfs pull`")
    return data


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None where there is no such file. Raises FormatError."""
    data = read_small(path)
    if data is None:
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the file is no JSON ({str(error)[:80]}); fetch it again") from None
    if not isinstance(value, dict):
        raise FormatError(f"{path}: holds a {type(value).__name__}, expected a JSON object")
    return value
