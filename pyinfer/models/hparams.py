"""Hyperparameters as the file's metadata says them; all guessing about missing keys happens here and nowhere
else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pyinfer import names
from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.gguf_file import GGUFFile
from pyinfer.program.rope import Rope

ACTIVATION = f"{names.PYINFER_PREFIX}activation"
LEAST_ROPE_NUMBER = 1e-6  # of what rotation divides by
MOST_LAYERS, MOST_WIDTH, MOST_HEADS = 4096, 1 << 20, 1 << 16


@dataclass(frozen=True)
class HParams:
    """The GGUF keys without their architecture prefix; lengths in elements."""

    architecture: str
    context_length: int
    embedding_length: int
    block_count: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    layer_norm_rms_epsilon: float
    sliding_window: int
    vocab_size: int
    rope: Rope
    layer_norm_epsilon: float = 0.0
    activation: str = ""  # of the feed-forward layers, "" for the family's own
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0  # what logits are divided by


class Keys:
    """Reads the keys of one architecture, with a check of kind and range."""

    def __init__(self, file: GGUFFile) -> None:
        self.file, self.architecture = file, file.architecture

    def name(self, template: str) -> str:
        return names.key(template, self.architecture)

    def integer(self, template: str, default: int | None, low: int, high: int) -> int:
        value = self._value(template, default)
        if isinstance(value, (list, np.ndarray)) and len(value) and all(v == value[0] for v in value):
            value = value[0]  # one number per layer, all equal
        if isinstance(value, (list, np.ndarray)):
            raise UnsupportedError(
                f"{self.file.path}: {self.name(template)} differs from layer to layer, which is not supported"
            )
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise FormatError(
                f"{self.file.path}: {self.name(template)} is {value!r}, "
                f"expected an integer from {low} to {high}"
            )
        return int(value)

    def number(
        self, template: str, default: float | None, low: float, high: float, *, above: bool = False
    ) -> float:
        """above: `low` itself is refused, too."""
        value = self._value(template, default)
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float, np.number))
            or not low <= value <= high
            or (above and value == low)
        ):
            least = f"above {low:g}, at most" if above else f"from {low:g} to"
            raise FormatError(
                f"{self.file.path}: {self.name(template)} is {value!r}, expected a number {least} {high:g}"
            )
        return float(value)

    def text(self, template: str, default: str) -> str:
        value = self.file.get(self.name(template), default)
        if not isinstance(value, str):
            raise FormatError(f"{self.file.path}: {self.name(template)} is {value!r}, expected a text")
        return value

    def _value(self, template: str, default):
        return (
            self.file.require(self.name(template))
            if default is None
            else self.file.get(self.name(template), default)
        )


def read_hparams(file: GGUFFile, *, neox: bool, layer_norm: bool = False) -> HParams:
    """Hyperparameters of a decoder; raises FormatError that names key, value and range.

    layer_norm: its norms are LayerNorms, whose epsilon has another key; 1e-5 where the file is silent (OPT by
    PowerInfer).
    """
    keys = Keys(file)
    embedding_length = keys.integer(names.EMBEDDING_LENGTH, None, 16, MOST_WIDTH)
    head_count = keys.integer(names.HEAD_COUNT, None, 1, MOST_HEADS)
    head_count_kv = keys.integer(names.HEAD_COUNT_KV, head_count, 1, head_count)
    key_length = keys.integer(names.KEY_LENGTH, max(1, embedding_length // head_count), 1, 4096)
    if keys.integer(names.VALUE_LENGTH, key_length, 1, 4096) != key_length:
        raise UnsupportedError(
            f"{file.path}: {keys.name(names.VALUE_LENGTH)} differs from key_length {key_length}, "
            "which is not supported"
        )
    if key_length % 16 or head_count % head_count_kv:
        raise UnsupportedError(
            f"{file.path}: heads of {key_length} elements, {head_count} for {head_count_kv} kv heads; "
            "supported are multiples of 16, and a whole number of heads per kv head"
        )
    if keys.integer(names.EXPERT_COUNT, 0, 0, 1 << 16):
        raise UnsupportedError(
            f"{file.path}: {keys.name(names.EXPERT_COUNT)} is not 0; mixtures of experts are not supported"
        )
    embedding = file.tensors.get(names.weight(names.TOKEN_EMBD))
    if embedding is None or len(embedding.shape) < 2:
        raise FormatError(f"{file.path}: tensor token_embd.weight is missing or no matrix")
    context_length = keys.integer(names.CONTEXT_LENGTH, None, 1, 1 << 31)
    return HParams(
        architecture=file.architecture,
        context_length=context_length,
        embedding_length=embedding_length,
        block_count=keys.integer(names.BLOCK_COUNT, None, 1, MOST_LAYERS),
        feed_forward_length=keys.integer(names.FEED_FORWARD_LENGTH, None, 1, MOST_WIDTH),
        head_count=head_count,
        head_count_kv=head_count_kv,
        key_length=key_length,
        layer_norm_rms_epsilon=0.0
        if layer_norm
        else keys.number(names.LAYER_NORM_RMS_EPSILON, None, 0.0, 1.0),
        sliding_window=keys.integer(names.SLIDING_WINDOW, 0, 0, 1 << 31),
        vocab_size=embedding.rows,
        rope=_read_rope(keys, key_length, context_length, neox),
        layer_norm_epsilon=keys.number(names.LAYER_NORM_EPSILON, 1e-5, 0.0, 1.0) if layer_norm else 0.0,
        # PowerInfer's engine knows ReLU only (Bamboo's twice), and its files do not say so.
        activation=keys.text(ACTIVATION, "relu" if file.powerinfer and file.architecture != "bamboo" else ""),
    )


def _read_rope(keys: Keys, key_length: int, context_length: int, neox: bool) -> Rope:
    file = keys.file
    dimension_count = keys.integer(names.ROPE_DIMENSION_COUNT, key_length, 2, key_length)
    if dimension_count % 2:
        raise FormatError(
            f"{file.path}: {keys.name(names.ROPE_DIMENSION_COUNT)} is {dimension_count}, "
            "expected an even number"
        )
    scaling_type = keys.text(names.ROPE_SCALING_TYPE, "none")
    if scaling_type not in ("none", "linear", "yarn"):
        raise UnsupportedError(
            f"{file.path}: {keys.name(names.ROPE_SCALING_TYPE)} is {scaling_type!r}, "
            "supported are none, linear, yarn"
        )
    factors: tuple[float, ...] = ()
    tensor = file.tensors.get(names.weight(names.ROPE_FREQS))
    if tensor is not None:
        if tensor.type != names.GGMLType.F32 or tensor.shape != (dimension_count // 2,):
            raise FormatError(
                f"{file.path}: rope_freqs.weight is {tensor.type.name} {list(tensor.shape)}, "
                f"expected F32 [{dimension_count // 2}]"
            )
        values = tensor.data.view(np.float32).astype(np.float64)
        if not (np.isfinite(values) & (values > 0)).all():
            raise FormatError(f"{file.path}: rope_freqs.weight holds a number that is not above 0")
        factors = tuple(values.tolist())
    # the older key counts where the newer one is missing or 0
    factor = keys.number(names.ROPE_SCALING_FACTOR, 0.0, 0.0, 1e6)
    given = names.ROPE_SCALING_FACTOR if factor else names.ROPE_SCALE_LINEAR
    return Rope(
        dimension_count=dimension_count,
        freq_base=keys.number(names.ROPE_FREQ_BASE, 10000.0, 1.0, 1e12, above=True),
        neox=neox,
        scaling_type=scaling_type,
        scaling_factor=keys.number(given, 1.0, LEAST_ROPE_NUMBER, 1e6),
        original_context_length=keys.integer(
            names.ROPE_SCALING_ORIGINAL_CONTEXT_LENGTH, context_length, 1, 1 << 31
        ),
        attn_factor=keys.number(names.ROPE_SCALING_ATTN_FACTOR, 1.0, 0.0, 1e3),
        beta_fast=keys.number(names.ROPE_SCALING_YARN_BETA_FAST, 32.0, LEAST_ROPE_NUMBER, 1e6),
        beta_slow=keys.number(names.ROPE_SCALING_YARN_BETA_SLOW, 1.0, LEAST_ROPE_NUMBER, 1e6),
        factors=factors,
    )
