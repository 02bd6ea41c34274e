"""gemma3 (text): embeddings scaled by the root of their width, norms around both sublayers, q and k
normalized per head.

Every sixth layer sees everything and rotates with freq_base (scaled); the others see the last
`sliding_window` positions and rotate with base 10000. The norms' +1 is already in the file's weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import sqrt
from typing import Any

import numpy as np

from pyinfer import names
from pyinfer.errors import UnsupportedError
from pyinfer.gguf_file import GGUFFile
from pyinfer.models.checkpoint import Rules, TensorRule, plus_one
from pyinfer.models.checkpoint_config import (
    Config,
    Sizes,
    activation_keys,
    add_rope_factors,
    check_rope_scaling,
    keys_of,
    read_sizes,
    rope_keys,
    rope_parameters,
    size_keys,
)
from pyinfer.models.checkpoint_decoder import Decoder, add_attention, add_ffn
from pyinfer.models.hparams import HParams, Keys, read_hparams
from pyinfer.models.llama import with_gate
from pyinfer.program.builder import Builder, Weights
from pyinfer.program.program import Program
from pyinfer.program.rope import Rope

LAYERS_PER_GLOBAL = 6
LOCAL_FREQ_BASE = 10000.0
BLOCKS_27B = (
    62  # the one size whose queries are scaled by width / heads, not by the head size; no key says so
)

HF_ARCHITECTURES = ("Gemma3ForCausalLM", "Gemma3ForConditionalGeneration")
DECODER = Decoder("gemma3", "gelu", neighbours=False, head_norms=True, norm_shift=plus_one, tied=True)
# What transformers' class assumes; published configurations leave it out.
DEFAULTS = {
    "vocab_size": 262_208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131_072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "hidden_activation": "gelu_pytorch_tanh",
}


def hparams(file: GGUFFile) -> HParams:
    hp = read_hparams(file, neox=True)
    keys = Keys(file)
    keys.integer(names.SLIDING_WINDOW, None, 1, 1 << 31)  # without it the local layers are undefined
    base = keys.number(names.ROPE_FREQ_BASE_SWA, LOCAL_FREQ_BASE, 1.0, 1e12)
    if base != LOCAL_FREQ_BASE:
        raise UnsupportedError(
            f"{file.path}: {keys.name(names.ROPE_FREQ_BASE_SWA)} is {base:g}, "
            f"supported is {LOCAL_FREQ_BASE:g}"
        )
    _check_pattern(keys, hp.block_count)
    return hp


def _check_pattern(keys: Keys, block_count: int) -> None:
    """Which layers are local: a period, or a flag for every layer."""
    found = keys.file.get(keys.name(names.SLIDING_WINDOW_PATTERN), LAYERS_PER_GLOBAL)
    if isinstance(found, (list, np.ndarray)):
        usual = [index % LAYERS_PER_GLOBAL != LAYERS_PER_GLOBAL - 1 for index in range(block_count)]
        supported = len(found) == block_count and list(found) == usual
    else:
        supported = type(found) is int and found == LAYERS_PER_GLOBAL
    if not supported:
        raise UnsupportedError(
            f"{keys.file.path}: {keys.name(names.SLIDING_WINDOW_PATTERN)} does not say that every "
            f"{LAYERS_PER_GLOBAL}th layer sees everything, which alone is supported"
        )


def build(b: Builder, hp: HParams, w: Weights) -> Program:
    heads, kv_heads, size, epsilon = hp.head_count, hp.head_count_kv, hp.key_length, hp.layer_norm_rms_epsilon
    local = Rope(hp.rope.dimension_count, LOCAL_FREQ_BASE, neox=True)
    everywhere = replace(hp.rope, attn_factor=1.0)
    scale = (hp.embedding_length / heads if hp.block_count == BLOCKS_27B else size) ** -0.5
    x = b.embed(w.token_embd, hp.embedding_length, sqrt(hp.embedding_length))
    for index, layer in enumerate(w.layers(hp.block_count)):
        is_global = index % LAYERS_PER_GLOBAL == LAYERS_PER_GLOBAL - 1
        rope, window = (everywhere, 0) if is_global else (local, hp.sliding_window)
        h = b.rms_norm(x, layer.attn_norm, epsilon)
        q = b.linear(h, layer.attn_q, heads * size)
        k = b.linear(h, layer.attn_k, kv_heads * size)
        v = b.linear(h, layer.attn_v, kv_heads * size)
        q = b.rope(b.rms_norm(q, layer.attn_q_norm, epsilon, heads), rope, heads)
        k = b.rope(b.rms_norm(k, layer.attn_k_norm, epsilon, kv_heads), rope, kv_heads)
        a = b.attend(index, q, k, v, heads=heads, kv_heads=kv_heads, scale=scale, window=window)
        a = b.linear(a, layer.attn_output, hp.embedding_length)
        x = b.add(x, b.rms_norm(a, layer.post_attention_norm, epsilon))
        h = b.ffn(
            b.rms_norm(x, layer.ffn_norm, epsilon),
            with_gate(layer),
            hp.activation or "gelu",
            hp.feed_forward_length,
        )
        x = b.add(x, b.rms_norm(h, layer.post_ffw_norm, epsilon))
    x = b.rms_norm(b.select(x), w.output_norm, epsilon)
    return b.finish(b.linear(x, w.output if w.has("output") else w.token_embd, hp.vocab_size))


def metadata(config: Mapping[str, Any]) -> dict[str, object]:
    """GGUF keys of a checkpoint with this config.json."""
    values = Config({**DEFAULTS, **config})
    sizes = read_sizes(values)
    _check_supported(values, sizes)
    local, everywhere = _ropes(values)
    window = values.integer("sliding_window", default=4096, high=1 << 31)
    given = {
        names.KEY_LENGTH: sizes.key_length,
        names.VALUE_LENGTH: sizes.key_length,
        names.LAYER_NORM_RMS_EPSILON: values.number("rms_norm_eps", low=0.0, high=1.0),
        names.SLIDING_WINDOW: window,
        names.ROPE_FREQ_BASE_SWA: local["rope_theta"],
    }
    return (
        size_keys("gemma3", sizes)
        | keys_of("gemma3", given)
        | rope_keys("gemma3", everywhere)
        | activation_keys(values.activation("hidden_activation", "hidden_act", default="gelu"), usual="gelu")
    )


def _ropes(values: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Rotation of the local layers and of those that see everything, from either spelling."""
    given = values.values.get("rope_parameters")
    if isinstance(given, Mapping) and "full_attention" in given:
        pair = (given.get("sliding_attention") or {}, given["full_attention"])
    else:
        base = values.number("rope_local_base_freq", default=LOCAL_FREQ_BASE, low=1.0, high=1e12)
        pair = ({"rope_theta": base}, given or values.values.get("rope_scaling") or {})
    if isinstance(pair[1], Mapping):
        check_rope_scaling(values, pair[1])
    theta = values.number("rope_theta", default=1e6, low=1.0, high=1e12)
    local, everywhere = (
        rope_parameters(Config({"rope_parameters": each}), default_base=default)
        for each, default in zip(pair, (LOCAL_FREQ_BASE, theta))
    )
    if local["rope_type"] != "default" or local["rope_theta"] != LOCAL_FREQ_BASE:
        raise UnsupportedError(
            f"config.json: local layers rotate by {local['rope_type']} with base {local['rope_theta']:g}, "
            f"supported is {LOCAL_FREQ_BASE:g} without scaling"
        )
    return local, everywhere


def _check_supported(values: Config, sizes: Sizes) -> None:
    """What the architecture's name fixes, since GGUF has no key for it."""
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        values.refuse(key)
    for key in ("use_bidirectional_attention", "attention_bias"):
        values.refuse(key, False)
    values.refuse("sliding_window_pattern", LAYERS_PER_GLOBAL)
    values.refuse("_sliding_window_pattern", LAYERS_PER_GLOBAL)
    kinds = values.values.get("layer_types")
    usual = [
        "full_attention" if index % LAYERS_PER_GLOBAL == LAYERS_PER_GLOBAL - 1 else "sliding_attention"
        for index in range(sizes.block_count)
    ]
    if kinds is not None and kinds != usual:
        raise UnsupportedError(
            f"config.json: layer_types is not a full_attention in every {LAYERS_PER_GLOBAL}th layer, "
            "which is not supported"
        )
    big = sizes.block_count == BLOCKS_27B
    scalar = sizes.embedding_length // sizes.head_count if big else sizes.key_length
    if values.number("query_pre_attn_scalar", default=scalar, low=1e-3, high=1e6) != scalar:
        values.refuse("query_pre_attn_scalar", scalar)


def tensors(config: Mapping[str, Any]) -> list[TensorRule]:
    """Where every tensor of the file comes from."""
    values = Config({**DEFAULTS, **config})
    sizes = read_sizes(values)
    width, vocabulary = sizes.embedding_length, sizes.vocab_size
    rules = Rules()
    add_rope_factors(rules, _ropes(values)[1], sizes.key_length)
    rules.add(names.TOKEN_EMBD, "model.embed_tokens", vocabulary, width)
    for block in range(sizes.block_count):
        prefix = f"model.layers.{block}."
        rules.add(names.ATTN_NORM, f"{prefix}input_layernorm", width, block=block, transform=plus_one)
        add_attention(rules, DECODER, values, block)
        for name, source in (
            (names.POST_ATTENTION_NORM, "post_attention_layernorm"),
            (names.FFN_NORM, "pre_feedforward_layernorm"),
        ):
            rules.add(name, f"{prefix}{source}", width, block=block, transform=plus_one)
        add_ffn(rules, sizes, False, block, gated=True)
        source = f"{prefix}post_feedforward_layernorm"
        rules.add(names.POST_FFW_NORM, source, width, block=block, transform=plus_one)
    rules.add(names.OUTPUT_NORM, "model.norm", width, transform=plus_one)
    tied = values.flag("tie_word_embeddings", default=True)
    rules.add_head("lm_head", "model.embed_tokens", vocabulary, width, tied)
    return rules.list
