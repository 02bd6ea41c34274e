"""The checkpoint side that Llama and its many relatives share: names, biases, order of the q and k rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pyinfer import names
from pyinfer.models.checkpoint import Rules, TensorRule, Transform, rotated_neighbours
from pyinfer.models.checkpoint_config import (
    Config,
    Sizes,
    activation_keys,
    add_rope_factors,
    keys_of,
    read_sizes,
    rope_keys,
    rope_parameters,
    size_keys,
)


@dataclass(frozen=True)
class Decoder:
    """What one relative has.

    neighbours : its GGUF rotates neighbours, so rows of q and k are reordered
    norm_shift : applied to the weights of norms
    """

    architecture: str
    activation: str
    neighbours: bool
    gated: bool = True
    head_norms: bool = False
    norm_shift: Transform | None = None
    tied: bool = False


def decoder_metadata(
    decoder: Decoder, config: Mapping[str, Any], default_base: float = 10000.0
) -> dict[str, object]:
    """Sizes, norm epsilon, rotation and activation."""
    values = Config(config)
    values.refuse("partial_rotary_factor", 1)
    sizes = read_sizes(values)
    epsilon = values.number("rms_norm_eps", default=1e-6, low=0.0, high=1.0)
    given = {names.LAYER_NORM_RMS_EPSILON: epsilon, names.ROPE_DIMENSION_COUNT: sizes.key_length}
    return (
        size_keys(decoder.architecture, sizes)
        | keys_of(decoder.architecture, given)
        | rope_keys(decoder.architecture, rope_parameters(values, default_base))
        | activation_keys(
            values.activation("hidden_act", default=decoder.activation), usual=decoder.activation
        )
    )


def window_keys(decoder: Decoder, config: Mapping[str, Any]) -> dict[str, object]:
    """The sliding window of every layer, where there is one."""
    values = Config(config)
    if values.values.get("sliding_window") is None:
        return {}
    window = values.integer("sliding_window", high=1 << 31)
    return keys_of(decoder.architecture, {names.SLIDING_WINDOW: window})


def decoder_tensors(
    decoder: Decoder, config: Mapping[str, Any], *, qkv_bias: bool = False
) -> list[TensorRule]:
    """Every tensor, in file order."""
    values = Config(config)
    sizes = read_sizes(values)
    tied = values.flag("tie_word_embeddings", default=decoder.tied)
    width, vocabulary = sizes.embedding_length, sizes.vocab_size
    rules = Rules()
    add_rope_factors(rules, rope_parameters(values), sizes.key_length)
    rules.add(names.TOKEN_EMBD, "model.embed_tokens", vocabulary, width)
    for block in range(sizes.block_count):
        prefix = f"model.layers.{block}."
        rules.add(names.ATTN_NORM, f"{prefix}input_layernorm", width, block=block)
        add_attention(rules, decoder, values, block, qkv_bias=qkv_bias)
        rules.add(names.FFN_NORM, f"{prefix}post_attention_layernorm", width, block=block)
        add_ffn(rules, sizes, values.flag("mlp_bias", default=False), block, gated=decoder.gated)
    rules.add(names.OUTPUT_NORM, "model.norm", width)
    rules.add_head("lm_head", "model.embed_tokens", vocabulary, width, tied)
    return rules.list


def add_attention(
    rules: Rules, decoder: Decoder, values: Config, block: int, *, qkv_bias: bool = False
) -> None:
    """q, k, v and output of one layer, with the norms of heads where the family has them."""
    sizes = read_sizes(values)
    width, size = sizes.embedding_length, sizes.key_length
    biased = values.flag("attention_bias", default=False)
    prefix = f"model.layers.{block}.self_attn."
    for name, part, heads in (
        (names.ATTN_Q, "q", sizes.head_count),
        (names.ATTN_K, "k", sizes.head_count_kv),
        (names.ATTN_V, "v", sizes.head_count_kv),
    ):
        transform = rotated_neighbours(heads) if decoder.neighbours and part != "v" else None
        rules.add(
            name,
            f"{prefix}{part}_proj",
            heads * size,
            width,
            block=block,
            bias=biased or qkv_bias,
            transform=transform,
        )
    if decoder.head_norms:
        rules.add(names.ATTN_Q_NORM, f"{prefix}q_norm", size, block=block, transform=decoder.norm_shift)
        rules.add(names.ATTN_K_NORM, f"{prefix}k_norm", size, block=block, transform=decoder.norm_shift)
    rules.add(names.ATTN_OUTPUT, f"{prefix}o_proj", width, sizes.head_count * size, block=block, bias=biased)


def add_ffn(rules: Rules, sizes: Sizes, bias: bool, block: int, *, gated: bool) -> None:
    """The feed-forward layer, with or without a gate."""
    width, neurons = sizes.embedding_length, sizes.feed_forward_length
    prefix = f"model.layers.{block}.mlp."
    if gated:
        rules.add(names.FFN_GATE, f"{prefix}gate_proj", neurons, width, block=block, bias=bias)
    rules.add(names.FFN_UP, f"{prefix}up_proj", neurons, width, block=block, bias=bias)
    rules.add(names.FFN_DOWN, f"{prefix}down_proj", width, neurons, block=block, bias=bias)
