"""The checkpoints of `relufy`: the teacher that is read, the student that is written. Needs no torch.

A student has one threshold per neuron, a checkpoint has one for all: `hidden_act` "fatrelu" with
`hidden_act_param` t, that is x where x > t, else 0 (ProSparse's FATReLU). The gate's row of a neuron is
scaled by t / theta and the row of `up` by the inverse, which changes no product gate * up.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.models.checkpoint_config import Config, read_sizes, rope_parameters
from pyinfer_convert.checkpoint import Checkpoint, open_checkpoint

ROW_TOKENS = 256  # of a row of training text; a teacher of a smaller context has smaller rows
LAYER = "model.layers.{}."
GATE, UP = LAYER + "mlp.gate_proj.weight", LAYER + "mlp.up_proj.weight"
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class Shape:
    """What the forward pass needs to know of a LLaMA; context : tokens of a row of text."""

    width: int
    neurons: int
    layers: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    context: int
    epsilon: float
    rope_base: float
    tied: bool
    bos: int


@dataclass(frozen=True)
class Teacher:
    """An open teacher: its shape, its config.json, its tensors float32 by their names, its folder."""

    shape: Shape
    config: dict[str, Any]
    tensors: dict[str, np.ndarray]
    folder: Path


def read_teacher(path: Path, activation: str = "silu") -> Teacher:
    """Read a SwiGLU checkpoint, or one with the gates of the given activation.

    raises UnsupportedError for another kind of model, FormatError for a fault, ModelNotFoundError
    """
    with open_checkpoint(path) as checkpoint:
        shape = _shape(checkpoint, activation)
        tensors = {name: _floats(checkpoint, name) for name in _expected(shape)}
        for name, wanted in _expected(shape).items():
            if tensors[name].shape != wanted:
                raise FormatError(f"{path}: {name} has shape {tensors[name].shape}, expected {wanted}")
        return Teacher(shape, dict(checkpoint.config), tensors, checkpoint.path)


def _shape(checkpoint: Checkpoint, activation: str) -> Shape:
    config = checkpoint.config
    architectures = config.get("architectures") or ["LlamaForCausalLM"]
    if architectures != ["LlamaForCausalLM"] or config.get("model_type", "llama") != "llama":
        raise UnsupportedError(
            f"config.json: architectures is {architectures}, expected ['LlamaForCausalLM']"
        )
    values = Config(config)
    if values.activation("hidden_act", default="silu").partition(":")[0] != activation:
        raise UnsupportedError(
            f"config.json: hidden_act is {config['hidden_act']!r}, expected {activation!r}"
        )
    values.refuse("attention_bias", False)
    values.refuse("mlp_bias", False)
    rope = rope_parameters(values)
    if rope["rope_type"] != "default":
        raise UnsupportedError(f"config.json: rope_type is {rope['rope_type']!r}, expected 'default'")
    sizes = read_sizes(values)
    tied = values.flag("tie_word_embeddings", default=False) or "lm_head.weight" not in checkpoint.names
    return Shape(
        width=sizes.embedding_length,
        neurons=sizes.feed_forward_length,
        layers=sizes.block_count,
        heads=sizes.head_count,
        kv_heads=sizes.head_count_kv,
        head_width=sizes.key_length,
        vocabulary=sizes.vocab_size,
        context=min(sizes.context_length, ROW_TOKENS),
        epsilon=values.number("rms_norm_eps", default=1e-6, low=0.0, high=1.0),
        rope_base=Config(rope).number("rope_theta", low=1.0, high=1e12),
        tied=tied,
        bos=values.integer("bos_token_id", low=0, high=sizes.vocab_size - 1),
    )


def _expected(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors by name."""
    d, f = shape.width, shape.neurons
    q, kv = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocabulary, d)}
    if not shape.tied:
        sizes["lm_head.weight"] = (shape.vocabulary, d)
    sizes["model.norm.weight"] = (d,)
    for index in range(shape.layers):
        layer = {
            "input_layernorm": (d,),
            "self_attn.q_proj": (q, d),
            "self_attn.k_proj": (kv, d),
            "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q),
            "post_attention_layernorm": (d,),
            "mlp.gate_proj": (f, d),
            "mlp.up_proj": (f, d),
            "mlp.down_proj": (d, f),
        }
        sizes |= {f"{LAYER.format(index)}{name}.weight": size for name, size in layer.items()}
    return sizes


def _floats(checkpoint: Checkpoint, name: str) -> np.ndarray:
    found = checkpoint.read(name)
    if found.dtype == np.uint16:  # raw bfloat16
        return (found.astype(np.uint32) << 16).view(np.float32)
    return found.astype(np.float32)


def shared_threshold(theta: np.ndarray) -> float:
    """The threshold of all neurons that leaves the scales of rows alone on average, in two digits."""
    return float(f"{math.exp(float(np.log(theta.astype(np.float64)).mean())):.1e}")


def fold(
    gate: np.ndarray, up: np.ndarray, theta: np.ndarray, threshold: float
) -> tuple[np.ndarray, np.ndarray]:
    """Rows of gate and up [F, D] such that `threshold` does for every neuron what theta [F] > 0 did."""
    scale = (threshold / theta.astype(np.float64))[:, None]
    return (gate * scale).astype(np.float32), (up / scale).astype(np.float32)


def write_student(folder: Path, teacher: Teacher, tensors: dict[str, np.ndarray], theta: np.ndarray) -> float:
    """Write a checkpoint folder: F32 weights, config, the teacher's tokenizer. Returns the shared threshold.

    tensors : weights by name, before folding;  theta : [layers, F]
    """
    threshold = shared_threshold(theta)
    folded = dict(tensors)
    for index, own in enumerate(theta):
        names = GATE.format(index), UP.format(index)
        folded |= dict(zip(names, fold(tensors[names[0]], tensors[names[1]], own, threshold)))
    config = {key: value for key, value in teacher.config.items() if key not in ("torch_dtype", "dtype")}
    config |= {"hidden_act": "fatrelu", "hidden_act_param": threshold, "torch_dtype": "float32"}
    folder.mkdir(parents=True, exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (teacher.folder / name).is_file() and not (folder / name).exists():
            shutil.copyfile(teacher.folder / name, folder / name)
    write_safetensors(folder / "model.safetensors", folded)
    write_atomically(folder / "config.json", json.dumps(config, indent=2).encode())
    return threshold


def write_safetensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write float32 arrays as a safetensors file (format: see pyinfer_convert.safetensors_file)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, array in tensors.items():
        header[name] = {
            "dtype": "F32",
            "shape": list(array.shape),
            "data_offsets": [start, start + array.nbytes],
        }
        start += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    parts = [np.ascontiguousarray(array, "<f4").tobytes() for array in tensors.values()]
    write_atomically(path, b"".join([len(text).to_bytes(8, "little"), text, *parts]))


def write_atomically(path: Path, content: bytes) -> None:
    """Replace the file at once: a reader, or a kill, sees the old bytes or the new ones."""
    temporary = path.with_name(path.name + ".part")
    with open(temporary, "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
