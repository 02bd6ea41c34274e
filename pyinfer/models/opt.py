"""opt: OPT 125M to 175B, Galactica. Learned positions, LayerNorm, biases everywhere, no gate, ReLU.

OPT-350M normalizes behind each sublayer (attn_output_norm, layer_output_norm, as GGUF names them for BERT)
instead of before it, has no last norm, and embeddings narrower than its layers: project_in and project_out.
llama.cpp has no OPT; the other names are PowerInfer's.

Source: Zhang et al. 2022; transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pyinfer import names
from pyinfer.errors import FormatError
from pyinfer.gguf_file import GGUFFile
from pyinfer.models.checkpoint import Rules, TensorRule
from pyinfer.models.checkpoint_config import MOST, Config, Sizes, activation_keys, keys_of, size_keys
from pyinfer.models.hparams import HParams, read_hparams
from pyinfer.program.builder import Builder, Weights
from pyinfer.program.program import Program, Value

HF_ARCHITECTURES = ("OPTForCausalLM",)
ARCHITECTURE, USUAL_ACTIVATION = "opt", "relu"
EPSILON = 1e-5  # of all LayerNorms; no config.json says it
FIRST_POSITION = 2  # rows of the position matrix before the one of position 0
POSITION_EMBD, PROJECT_IN, PROJECT_OUT = "position_embd", "project_in", "project_out"
ATTN_OUTPUT_NORM, LAYER_OUTPUT_NORM = "attn_output_norm", "layer_output_norm"


def hparams(file: GGUFFile) -> HParams:
    hp = read_hparams(file, neox=False, layer_norm=True)
    positions = file.tensors.get(names.weight(POSITION_EMBD))  # that it is there, and large enough: `build`
    learned = hp.context_length if positions is None else positions.rows - FIRST_POSITION
    return replace(hp, context_length=min(hp.context_length, learned))


def build(b: Builder, hp: HParams, w: Weights) -> Program:
    width, epsilon = hp.embedding_length, hp.layer_norm_epsilon
    narrow = w.token_embd.tensor.columns
    first = w.layers(1)[0]
    before = not (first.has(ATTN_OUTPUT_NORM) or first.has(LAYER_OUTPUT_NORM))
    x = b.embed(w.token_embd, narrow)
    if narrow != width:
        x = b.linear(x, w.project_in, width)
    x = b.embed_position(x, w.position_embd, FIRST_POSITION)
    for index, layer in enumerate(w.layers(hp.block_count)):
        h = b.layer_norm(x, layer.attn_norm, epsilon) if before else x
        x = b.add(x, _attention(b, hp, layer, index, h))
        if not before:
            x = b.layer_norm(x, layer.attn_output_norm, epsilon)
        h = b.layer_norm(x, layer.ffn_norm, epsilon) if before else x
        x = b.add(x, b.ffn(h, layer, hp.activation or USUAL_ACTIVATION, hp.feed_forward_length, raw=x))
        if not before:
            x = b.layer_norm(x, layer.layer_output_norm, epsilon)
    x = b.select(x)
    if w.has(names.OUTPUT_NORM):
        x = b.layer_norm(x, w.output_norm, epsilon)
    if narrow != width:
        x = b.linear(x, w.project_out, narrow)
    return b.finish(b.linear(x, w.output if w.has("output") else w.token_embd, hp.vocab_size))


def _attention(b: Builder, hp: HParams, layer: Weights, index: int, h: Value) -> Value:
    heads, width = hp.head_count, hp.embedding_length
    q, k, v = (b.linear(h, weight, width) for weight in (layer.attn_q, layer.attn_k, layer.attn_v))
    a = b.attend(index, q, k, v, heads=heads, kv_heads=heads, scale=hp.key_length**-0.5)
    return b.linear(a, layer.attn_output, width)


def _read_sizes(values: Config) -> Sizes:
    width = values.integer("hidden_size", low=16, high=MOST["width"])
    heads = values.integer("num_attention_heads", high=MOST["heads"])
    if width % heads:
        raise FormatError(f"config.json: num_attention_heads is {heads}, hidden_size {width} is no multiple")
    return Sizes(
        embedding_length=width,
        block_count=values.integer("num_hidden_layers", high=MOST["layers"]),
        feed_forward_length=values.integer("ffn_dim", high=MOST["width"]),
        head_count=heads,
        head_count_kv=heads,
        key_length=width // heads,
        vocab_size=values.integer("vocab_size", high=MOST["tokens"]),
        context_length=values.integer("max_position_embeddings", default=2048, high=MOST["tokens"]),
    ).check()


def metadata(config: Mapping[str, Any]) -> dict[str, object]:
    """GGUF keys of a checkpoint with this config.json."""
    values = Config(config)
    activation = values.activation("activation_function", default=USUAL_ACTIVATION)
    return (
        size_keys(ARCHITECTURE, _read_sizes(values))
        | keys_of(ARCHITECTURE, {names.LAYER_NORM_EPSILON: EPSILON})
        | activation_keys(activation, usual=USUAL_ACTIVATION)
    )


def tensors(config: Mapping[str, Any]) -> list[TensorRule]:
    """Where every tensor of the file comes from."""
    values = Config(config)
    sizes = _read_sizes(values)
    width, vocabulary = sizes.embedding_length, sizes.vocab_size
    narrow = values.integer("word_embed_proj_dim", default=width, low=16, high=MOST["width"])
    before = values.flag("do_layer_norm_before", default=True)
    decoder = "model.decoder."
    rules = Rules()
    rules.add(names.TOKEN_EMBD, f"{decoder}embed_tokens", vocabulary, narrow)
    rules.add(POSITION_EMBD, f"{decoder}embed_positions", sizes.context_length + FIRST_POSITION, width)
    if narrow != width:
        rules.add(PROJECT_IN, f"{decoder}project_in", width, narrow)
    for block in range(sizes.block_count):
        _add_layer(rules, values, sizes, block, before)
    if before and not values.flag("_remove_final_layer_norm", default=False):
        _add_norm(rules, values, names.OUTPUT_NORM, f"{decoder}final_layer_norm", width)
    if narrow != width:
        rules.add(PROJECT_OUT, f"{decoder}project_out", narrow, width)
    tied = values.flag("tie_word_embeddings", default=True)
    rules.add_head("lm_head", f"{decoder}embed_tokens", vocabulary, narrow, tied)
    return rules.list


def _add_layer(rules: Rules, values: Config, sizes: Sizes, block: int, before: bool) -> None:
    width, neurons = sizes.embedding_length, sizes.feed_forward_length
    bias = values.flag("enable_bias", default=True)
    prefix = f"model.decoder.layers.{block}."
    attention_norm = names.ATTN_NORM if before else ATTN_OUTPUT_NORM
    _add_norm(rules, values, attention_norm, f"{prefix}self_attn_layer_norm", width, block)
    for name, part in (
        (names.ATTN_Q, "q_proj"),
        (names.ATTN_K, "k_proj"),
        (names.ATTN_V, "v_proj"),
        (names.ATTN_OUTPUT, "out_proj"),
    ):
        rules.add(name, f"{prefix}self_attn.{part}", width, width, block=block, bias=bias)
    ffn_norm = names.FFN_NORM if before else LAYER_OUTPUT_NORM
    _add_norm(rules, values, ffn_norm, f"{prefix}final_layer_norm", width, block)
    rules.add(names.FFN_UP, f"{prefix}fc1", neurons, width, block=block, bias=bias)
    rules.add(names.FFN_DOWN, f"{prefix}fc2", width, neurons, block=block, bias=bias)


def _add_norm(
    rules: Rules, values: Config, name: str, source: str, length: int, block: int | None = None
) -> None:
    """A LayerNorm; one without parameters multiplies by one."""
    if values.flag("layer_norm_elementwise_affine", default=True):
        rules.add_norm(name, source, length, block)
    else:
        ones = TensorRule(names.weight(name, block), "", (length,), lambda _: np.ones(length, np.float32))
        rules.list.append(ones)
