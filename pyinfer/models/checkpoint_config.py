"""A checkpoint's config.json, read with a check of kind and range, and the GGUF metadata that decoders of all
families share.

Defaults are those of the transformers classes, which write only what differs.

Source: transformers (configuration classes, modeling_rope_utils), llama.cpp's key names, YaRN, Llama 3.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from pyinfer import names
from pyinfer.errors import FormatError, UnsupportedError
from pyinfer.models.checkpoint import Rules, TensorRule
from pyinfer.models.hparams import ACTIVATION, LEAST_ROPE_NUMBER

MOST = {"layers": 4096, "width": 1 << 20, "heads": 1 << 16, "tokens": 1 << 31}

# transformers' names; its "gelu" is the exact one, GGUF's is the approximation by tanh.
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu_erf",
    "gelu_new": "gelu",
    "gelu_fast": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "relu": "relu",
    "relu2": "relu2",
    "drelu": "drelu",
}


class Config:
    """config.json; every reader takes the key and, for older spellings, others that are tried after it."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.values = values
        if values.get("quantization_config"):
            raise UnsupportedError(
                "config.json: quantization_config is there, the weights are quantized already; "
                "convert the original checkpoint"
            )

    def _find(self, keys: tuple[str, ...], default: Any, expected: str) -> tuple[str, Any]:
        for key in keys:
            if self.values.get(key) is not None:
                return key, self.values[key]
        if default is None:
            raise FormatError(f"config.json: {keys[0]} is missing, expected {expected}")
        return keys[0], default

    def integer(self, *keys: str, default: int | None = None, low: int = 1, high: int) -> int:
        expected = f"an integer from {low} to {high}"
        key, value = self._find(keys, default, expected)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise FormatError(f"config.json: {key} is {value!r}, expected {expected}")
        return value

    def number(self, *keys: str, default: float | None = None, low: float, high: float) -> float:
        expected = f"a number from {low:g} to {high:g}"
        key, value = self._find(keys, default, expected)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise FormatError(f"config.json: {key} is {value!r}, expected {expected}")
        return float(value)

    def flag(self, *keys: str, default: bool) -> bool:
        key, value = self._find(keys, default, "true or false")
        if not isinstance(value, bool):
            raise FormatError(f"config.json: {key} is {value!r}, expected true or false")
        return value

    def refuse(self, key: str, *allowed: Any) -> None:
        """Raises UnsupportedError unless the key is missing, null, or one of the allowed values."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            only = f"supported is {' or '.join(map(repr, allowed))}" if allowed else "which is not supported"
            raise UnsupportedError(f"config.json: {key} is {value!r}, {only}")

    def activation(self, *keys: str, default: str) -> str:
        """Activation of the feed-forward layers, as programs name it."""
        key, value = self._find(keys, default, "the name of an activation")
        if value == "fatrelu":
            threshold = self.number("hidden_act_param", low=0.0, high=1e3)
            return f"fatrelu:{np.format_float_positional(threshold, trim='-')}"
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            known = ", ".join([*_ACTIVATIONS, "fatrelu"])
            raise UnsupportedError(f"config.json: {key} is {value!r}, supported are {known}")
        return _ACTIVATIONS[value]


@dataclass(frozen=True)
class Sizes:
    """The sizes of a decoder, named as the GGUF keys."""

    embedding_length: int
    block_count: int
    feed_forward_length: int
    head_count: int
    head_count_kv: int
    key_length: int
    vocab_size: int
    context_length: int

    def check(self) -> Sizes:
        """Raises UnsupportedError for heads that the engine cannot compute."""
        if self.key_length % 16:
            raise UnsupportedError(
                f"config.json: heads have {self.key_length} elements (head_dim, or hidden_size by "
                "num_attention_heads), supported are multiples of 16"
            )
        if self.head_count % self.head_count_kv:
            raise FormatError(
                f"config.json: num_attention_heads is {self.head_count}, which is no multiple of the "
                f"{self.head_count_kv} kv heads"
            )
        return self


def read_sizes(config: Config) -> Sizes:
    """Sizes of a checkpoint that names them as Llama does."""
    width = config.integer("hidden_size", low=16, high=MOST["width"])
    heads = config.integer("num_attention_heads", high=MOST["heads"])
    if width % heads and config.values.get("head_dim") is None:
        raise FormatError(f"config.json: num_attention_heads is {heads}, hidden_size {width} is no multiple")
    return Sizes(
        embedding_length=width,
        block_count=config.integer("num_hidden_layers", high=MOST["layers"]),
        feed_forward_length=config.integer("intermediate_size", high=MOST["width"]),
        head_count=heads,
        head_count_kv=config.integer("num_key_value_heads", default=heads, high=heads),
        key_length=config.integer("head_dim", default=width // heads, high=4096),
        vocab_size=config.integer("vocab_size", high=MOST["tokens"]),
        context_length=config.integer("max_position_embeddings", default=2048, high=MOST["tokens"]),
    ).check()


def size_keys(architecture: str, sizes: Sizes) -> dict[str, object]:
    """Architecture and sizes; the head size only where it does not follow from the others."""
    given: dict[str, object] = {
        names.VOCAB_SIZE: sizes.vocab_size,
        names.CONTEXT_LENGTH: sizes.context_length,
        names.EMBEDDING_LENGTH: sizes.embedding_length,
        names.BLOCK_COUNT: sizes.block_count,
        names.FEED_FORWARD_LENGTH: sizes.feed_forward_length,
        names.HEAD_COUNT: sizes.head_count,
        names.HEAD_COUNT_KV: sizes.head_count_kv,
    }
    if sizes.key_length * sizes.head_count != sizes.embedding_length:
        given |= {names.KEY_LENGTH: sizes.key_length, names.VALUE_LENGTH: sizes.key_length}
    return {names.ARCHITECTURE: architecture} | keys_of(architecture, given)


def keys_of(architecture: str, given: Mapping[str, object]) -> dict[str, object]:
    """Key templates filled in."""
    return {names.key(template, architecture): value for template, value in given.items()}


def activation_keys(activation: str, usual: str) -> dict[str, object]:
    """Our key where the activation is not the one that the architecture's name implies."""
    return {} if activation == usual else {ACTIVATION: activation}


def check_rope_scaling(config: Config, parameters: Mapping[str, Any]) -> None:
    """Raises FormatError where the elder rope_scaling is there too and says something else."""
    scaling = config.values.get("rope_scaling")
    if not scaling:
        return
    one, other = _scaling_of(parameters), _scaling_of(scaling) if isinstance(scaling, Mapping) else None
    if other is not None:
        # Elder files have these two beside rope_scaling, not in it.
        for key in ("rope_theta", "partial_rotary_factor"):
            one[key], other[key] = one.get(key, other.get(key)), other.get(key, one.get(key))
    if one != other:
        raise FormatError(
            f"config.json: rope_scaling is {str(scaling)[:200]}, but rope_parameters is "
            f"{str(dict(parameters))[:200]}; remove the one that is wrong"
        )


def _scaling_of(rope: Mapping[str, Any]) -> dict[str, Any]:
    found = {key: value for key, value in rope.items() if key != "type" and value is not None}
    return found | {"rope_type": rope.get("rope_type", rope.get("type")) or "default"}


def rope_parameters(config: Config, default_base: float = 10000.0) -> dict[str, Any]:
    """rope_type, rope_theta and what belongs to the type, from either spelling of config.json.

    raises FormatError where there are both and they contradict each other
    """
    given = config.values.get("rope_parameters")
    if given is None:
        given = config.values.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise FormatError(f"config.json: rope_parameters is {given!r}, expected an object")
    check_rope_scaling(config, given)
    base = config.number("rope_theta", default=default_base, low=1.0, high=1e12)
    merged = {"rope_theta": base, **given}
    merged["rope_type"] = given.get("rope_type", given.get("type")) or "default"
    return merged


def rope_keys(architecture: str, rope: Mapping[str, Any]) -> dict[str, object]:
    """Base and scaling; Llama 3's scaling is a tensor, see `add_rope_factors`."""
    values = Config(rope)
    kind = rope["rope_type"]
    given: dict[str, object] = {names.ROPE_FREQ_BASE: values.number("rope_theta", low=1.0, high=1e12)}
    if kind not in ("default", "linear", "yarn", "llama3"):
        raise UnsupportedError(
            f"config.json: rope_type is {kind!r}, supported are default, linear, yarn, llama3"
        )
    if kind in ("linear", "yarn"):
        given[names.ROPE_SCALING_TYPE] = kind
        given[names.ROPE_SCALING_FACTOR] = values.number("factor", low=1e-6, high=1e6)
    if kind == "yarn":
        values.refuse("mscale_all_dim", 0)
        if "truncate" in rope and rope["truncate"] is not True:
            values.refuse("truncate", True)
        factor = values.number("factor", low=1.0, high=1e6)
        usual = 1.0 + 0.1 * math.log(factor)
        if abs(values.number("attention_factor", default=usual, low=0.0, high=1e3) - usual) > 1e-6:
            values.refuse("attention_factor", round(usual, 6))
        given[names.ROPE_SCALING_ORIGINAL_CONTEXT_LENGTH] = values.integer(
            "original_max_position_embeddings", high=MOST["tokens"]
        )
        given[names.ROPE_SCALING_YARN_BETA_FAST] = values.number(
            "beta_fast", default=32.0, low=LEAST_ROPE_NUMBER, high=1e6
        )
        given[names.ROPE_SCALING_YARN_BETA_SLOW] = values.number(
            "beta_slow", default=1.0, low=LEAST_ROPE_NUMBER, high=1e6
        )
    return keys_of(architecture, given)


def add_rope_factors(rules: Rules, rope: Mapping[str, Any], dimension_count: int) -> None:
    """Llama 3's divisors of the rope frequencies, which GGUF keeps as a tensor."""
    if rope["rope_type"] == "llama3":
        factors = _llama3_factors(Config(rope), dimension_count)
        rules.list.append(
            TensorRule(names.weight(names.ROPE_FREQS), "", factors.shape, transform=lambda _: factors)
        )


def _llama3_factors(rope: Config, dimension_count: int) -> np.ndarray:
    """float32 [dimension_count / 2]: 1 for short wavelengths, `factor` for long ones, blended between."""
    factor = rope.number("factor", low=1.0, high=1e6)
    low = rope.number("low_freq_factor", low=1e-6, high=1e6)
    high = rope.number("high_freq_factor", low=1e-6, high=1e6)
    if high <= low:
        raise FormatError(f"config.json: high_freq_factor is {high:g}, expected more than {low:g}")
    original = rope.integer("original_max_position_embeddings", high=MOST["tokens"])
    base = rope.number("rope_theta", low=1.0, high=1e12)
    exponents = np.arange(0, dimension_count, 2) / dimension_count
    turns = original * base**-exponents / (2 * math.pi)
    kept = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / (kept + (1.0 - kept) / factor)).astype(np.float32)
