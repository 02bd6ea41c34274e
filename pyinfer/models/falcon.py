"""falcon: Falcon 7B, 40B, 180B and 2-11B, also with ReLU. Attention and feed-forward layer read the same
input and are added together; q, k and v are one matrix.

The large ones normalize that input twice, for the feed-forward layer (attn_norm) and for attention
(attn_norm_2). transformers computes GELU exactly, so this does too.

Source: Almazrouei et al. 2023; llama.cpp's names; the order Q, K, V of the fused rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pyinfer import names
from pyinfer.errors import FormatError
from pyinfer.gguf_file import GGUFFile
from pyinfer.models.checkpoint import Rules, TensorRule, Transform
from pyinfer.models.checkpoint_config import (
    MOST,
    Config,
    Sizes,
    activation_keys,
    keys_of,
    rope_keys,
    rope_parameters,
    size_keys,
)
from pyinfer.models.hparams import HParams, read_hparams
from pyinfer.program.builder import Builder, Weights
from pyinfer.program.program import Program

HF_ARCHITECTURES = ("FalconForCausalLM", "RWForCausalLM")
ARCHITECTURE, USUAL_ACTIVATION = "falcon", "gelu_erf"


def hparams(file: GGUFFile) -> HParams:
    return read_hparams(file, neox=True, layer_norm=True)


def build(b: Builder, hp: HParams, w: Weights) -> Program:
    heads, kv_heads, size, epsilon = hp.head_count, hp.head_count_kv, hp.key_length, hp.layer_norm_epsilon
    widths = heads * size, kv_heads * size, kv_heads * size
    x = b.embed(w.token_embd, hp.embedding_length)
    for index, layer in enumerate(w.layers(hp.block_count)):
        raw, h = x, b.layer_norm(x, layer.attn_norm, epsilon)
        n = b.layer_norm(x, layer.attn_norm_2, epsilon) if layer.has("attn_norm_2") else h
        q, k, v = b.slices(b.linear(n, layer.attn_qkv, sum(widths)), *widths)
        q, k = b.rope(q, hp.rope, heads), b.rope(k, hp.rope, kv_heads)
        a = b.attend(index, q, k, v, heads=heads, kv_heads=kv_heads, scale=size**-0.5)
        x = b.add(x, b.linear(a, layer.attn_output, hp.embedding_length))
        activation = hp.activation or USUAL_ACTIVATION
        x = b.add(x, b.ffn(h, layer, activation, hp.feed_forward_length, raw=raw))
    x = b.layer_norm(b.select(x), w.output_norm, epsilon)
    return b.finish(b.linear(x, w.output if w.has("output") else w.token_embd, hp.vocab_size))


def _is_large(values: Config) -> bool:
    """The layout of the 40B model; the first releases did not name it, but count kv heads."""
    unnamed = values.values.get("n_head_kv") is not None and not values.flag("multi_query", default=False)
    return values.flag("new_decoder_architecture", default=unnamed)


def _two_norms(values: Config) -> bool:
    return _is_large(values) and values.integer("num_ln_in_parallel_attn", default=2, high=2) == 2


def _read_sizes(values: Config) -> Sizes:
    width = values.integer("hidden_size", low=16, high=MOST["width"])
    heads = values.integer("num_attention_heads", "n_head", high=MOST["heads"])
    if width % heads:
        raise FormatError(f"config.json: num_attention_heads is {heads}, hidden_size {width} is no multiple")
    one_head = values.flag("multi_query", default=True) and not _is_large(values)
    kv_heads = 1 if one_head else values.integer("num_kv_heads", "n_head_kv", default=heads, high=heads)
    return Sizes(
        embedding_length=width,
        block_count=values.integer("num_hidden_layers", "n_layer", high=MOST["layers"]),
        feed_forward_length=values.integer("ffn_hidden_size", default=4 * width, high=MOST["width"]),
        head_count=heads,
        head_count_kv=kv_heads,
        key_length=width // heads,
        vocab_size=values.integer("vocab_size", high=MOST["tokens"]),
        context_length=values.integer("max_position_embeddings", default=2048, high=MOST["tokens"]),
    ).check()


def metadata(config: Mapping[str, Any]) -> dict[str, object]:
    """GGUF keys of a checkpoint with this config.json."""
    values = Config(config)
    values.refuse("alibi", False)
    if not _is_large(values):
        values.refuse("parallel_attn", True)
    given = {
        names.LAYER_NORM_EPSILON: values.number("layer_norm_epsilon", default=1e-5, low=0.0, high=1.0),
        names.TENSOR_DATA_LAYOUT: "jploski",  # the word by which readers know the order Q, K, V
    }
    activation = values.activation("activation", default="gelu")
    return (
        size_keys(ARCHITECTURE, _read_sizes(values))
        | keys_of(ARCHITECTURE, given)
        | rope_keys(ARCHITECTURE, rope_parameters(values))
        | activation_keys(activation, usual=USUAL_ACTIVATION)
    )


def tensors(config: Mapping[str, Any]) -> list[TensorRule]:
    """Where every tensor of the file comes from."""
    values = Config(config)
    sizes = _read_sizes(values)
    width, neurons, size = sizes.embedding_length, sizes.feed_forward_length, sizes.key_length
    bias = values.flag("bias", default=False)
    fused = (sizes.head_count + 2 * sizes.head_count_kv) * size
    rules = Rules()
    rules.add(names.TOKEN_EMBD, "transformer.word_embeddings", sizes.vocab_size, width)
    for block in range(sizes.block_count):
        prefix = f"transformer.h.{block}."
        if _two_norms(values):
            rules.add_norm(names.ATTN_NORM, f"{prefix}ln_mlp", width, block)
            rules.add_norm("attn_norm_2", f"{prefix}ln_attn", width, block)
        else:
            rules.add_norm(names.ATTN_NORM, f"{prefix}input_layernorm", width, block)
        rules.add(
            names.ATTN_QKV,
            f"{prefix}self_attention.query_key_value",
            fused,
            width,
            block=block,
            bias=bias,
            transform=_kinds_together(sizes.head_count_kv, size),
        )
        rules.add(names.ATTN_OUTPUT, f"{prefix}self_attention.dense", width, width, block=block, bias=bias)
        rules.add(names.FFN_UP, f"{prefix}mlp.dense_h_to_4h", neurons, width, block=block, bias=bias)
        rules.add(names.FFN_DOWN, f"{prefix}mlp.dense_4h_to_h", width, neurons, block=block, bias=bias)
    rules.add_norm(names.OUTPUT_NORM, "transformer.ln_f", width)
    tied = values.flag("tie_word_embeddings", default=True)
    rules.add_head("lm_head", "transformer.word_embeddings", sizes.vocab_size, width, tied)
    return rules.list


def _kinds_together(kv_heads: int, size: int) -> Transform:
    """Reorders fused rows from queries, key, value of every kv head to all queries, all keys, all values."""

    def transform(array: np.ndarray) -> np.ndarray:
        groups = array.reshape(kv_heads, -1, size, *array.shape[1:])
        parts = [groups[:, :-2], groups[:, -2], groups[:, -1]]
        return np.concatenate([part.reshape(-1, *array.shape[1:]) for part in parts])

    return transform
