"""nemotron: Nemotron-3 and -4, Minitron. LayerNorm, a part of every head is rotated, the feed-forward layer
has no gate and squares its ReLU.

Checkpoints store norm weights less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyinfer import names
from pyinfer.errors import FormatError
from pyinfer.gguf_file import GGUFFile
from pyinfer.models.checkpoint import Rules, TensorRule, plus_one
from pyinfer.models.checkpoint_config import (
    Config,
    activation_keys,
    keys_of,
    read_sizes,
    rope_keys,
    rope_parameters,
    size_keys,
)
from pyinfer.models.checkpoint_decoder import Decoder, add_attention, add_ffn
from pyinfer.models.hparams import HParams, read_hparams
from pyinfer.program.builder import Builder, Weights
from pyinfer.program.program import Program

HF_ARCHITECTURES = ("NemotronForCausalLM",)
DECODER = Decoder("nemotron", "relu2", neighbours=False, gated=False)


def hparams(file: GGUFFile) -> HParams:
    return read_hparams(file, neox=True, layer_norm=True)


def build(b: Builder, hp: HParams, w: Weights) -> Program:
    heads, kv_heads, size, epsilon = hp.head_count, hp.head_count_kv, hp.key_length, hp.layer_norm_epsilon
    x = b.embed(w.token_embd, hp.embedding_length)
    for index, layer in enumerate(w.layers(hp.block_count)):
        h = b.layer_norm(x, layer.attn_norm, epsilon)
        q = b.rope(b.linear(h, layer.attn_q, heads * size), hp.rope, heads)
        k = b.rope(b.linear(h, layer.attn_k, kv_heads * size), hp.rope, kv_heads)
        v = b.linear(h, layer.attn_v, kv_heads * size)
        a = b.attend(index, q, k, v, heads=heads, kv_heads=kv_heads, scale=size**-0.5)
        x = b.add(x, b.linear(a, layer.attn_output, hp.embedding_length))
        h = b.layer_norm(x, layer.ffn_norm, epsilon)
        h = b.ffn(h, layer, hp.activation or DECODER.activation, hp.feed_forward_length, raw=x)
        x = b.add(x, h)
    x = b.layer_norm(b.select(x), w.output_norm, epsilon)
    return b.finish(b.linear(x, w.output if w.has("output") else w.token_embd, hp.vocab_size))


def metadata(config: Mapping[str, Any]) -> dict[str, object]:
    """GGUF keys of a checkpoint with this config.json."""
    values = Config(config)
    sizes = read_sizes(values)
    rope = rope_parameters(values)
    fraction = Config({**config, **rope}).number(
        "partial_rotary_factor", "rope_percent", default=0.5, low=0.0, high=1.0
    )
    rotated = int(sizes.key_length * fraction)
    if rotated < 2 or rotated % 2:
        raise FormatError(
            f"config.json: partial_rotary_factor {fraction:g} rotates {rotated} of a head's "
            f"{sizes.key_length} elements, expected an even number"
        )
    given = {
        names.LAYER_NORM_EPSILON: values.number(
            "norm_eps", "layer_norm_eps", default=1e-5, low=0.0, high=1.0
        ),
        names.ROPE_DIMENSION_COUNT: rotated,
    }
    activation = values.activation("hidden_act", default=DECODER.activation)
    return (
        size_keys(DECODER.architecture, sizes)
        | keys_of(DECODER.architecture, given)
        | rope_keys(DECODER.architecture, rope)
        | activation_keys(activation, usual=DECODER.activation)
    )


def tensors(config: Mapping[str, Any]) -> list[TensorRule]:
    """Where every tensor of the file comes from."""
    values = Config(config)
    sizes = read_sizes(values)
    width, vocabulary = sizes.embedding_length, sizes.vocab_size
    rules = Rules()
    rules.add(names.TOKEN_EMBD, "model.embed_tokens", vocabulary, width)
    for block in range(sizes.block_count):
        prefix = f"model.layers.{block}."
        rules.add_norm(names.ATTN_NORM, f"{prefix}input_layernorm", width, block, plus_one)
        add_attention(rules, DECODER, values, block)
        rules.add_norm(names.FFN_NORM, f"{prefix}post_attention_layernorm", width, block, plus_one)
        add_ffn(rules, sizes, values.flag("mlp_bias", default=False), block, gated=False)
    rules.add_norm(names.OUTPUT_NORM, "model.norm", width, transform=plus_one)
    tied = values.flag("tie_word_embeddings", default=False)
    rules.add_head("lm_head", "model.embed_tokens", vocabulary, width, tied)
    return rules.list
