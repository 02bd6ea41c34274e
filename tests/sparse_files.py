"""Sparse models for tests: tiny checkpoints of ReLU families, with down neuron by neuron and predictors."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from hf_checkpoints import FOLDER, converted

from pyinfer import names
from pyinfer_convert.checkpoint import open_checkpoint

# relu, fatrelu, relu with scaled residuals, drelu, no gate (relu, relu2, parallel residual, biases)
ZEROING = (
    "relu_llama",
    "prosparse_llama",
    "minicpm_s",
    "bamboo",
    "mistral_drelu",
    "nemotron",
    "nemotron_bias",
    "arcee",
    "opt",
    "falcon_40b_relu",
)
RANK = 32
Predictors = dict[int, tuple[np.ndarray, np.ndarray]]


def random_predictors(name: str, seed: int = 0) -> Predictors:
    """fc1 [RANK, D] and fc2 [F, RANK] of every layer."""
    random = np.random.default_rng(seed)
    with open_checkpoint(FOLDER / name) as checkpoint:
        tensors = converted(checkpoint)[1]
    made = {}
    for key, array in tensors.items():
        if key.endswith("ffn_up.weight"):
            neurons, width = array.shape
            fc1 = random.standard_normal((RANK, width)).astype(np.float32) / np.float32(width**0.5)
            fc2 = random.standard_normal((neurons, RANK)).astype(np.float32)
            made[int(key.split(".")[1])] = fc1, fc2
    return made


def sparse_gguf(
    path: Path,
    name: str,
    quant: str = "f32",
    predictors: Predictors | None = None,
    keys: dict[str, object] | None = None,
    extra: dict[str, np.ndarray] | None = None,
) -> Path:
    """Write a tiny checkpoint as a sparse model; matrices of blocks in `quant`, predictors as floats."""
    with open_checkpoint(FOLDER / name) as checkpoint:
        metadata, tensors = converted(checkpoint)
    kind = gguf.GGMLQuantizationType[quant.upper()]
    writer = gguf.GGUFWriter(path, str(metadata.pop(names.ARCHITECTURE)))
    for key, value in {**metadata, **(keys or {})}.items():
        add = {bool: "add_bool", int: "add_uint32", float: "add_float32", str: "add_string"}[type(value)]
        getattr(writer, add)(key, value)
    for key, array in tensors.items():
        if key.endswith((".fc1.weight", ".fc2.weight")):
            continue
        if ".ffn_down." in key:
            key, array = key.replace(".ffn_down.", ".ffn_down_t."), array.T if array.ndim == 2 else array
        array = np.ascontiguousarray(array)
        if array.ndim == 2 and key.startswith("blk.") and kind != gguf.GGMLQuantizationType.F32:
            writer.add_tensor(key, gguf.quants.quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, array)
    for layer, (fc1, fc2) in (predictors or {}).items():
        writer.add_tensor(names.weight(names.FC1, layer), np.ascontiguousarray(fc1))
        writer.add_tensor(names.weight(names.FC2, layer), np.ascontiguousarray(fc2))
    for key, array in (extra or {}).items():
        writer.add_tensor(key, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
