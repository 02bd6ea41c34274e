"""minicpm: MiniCPM 1 and 2, MiniCPM-S. As llama, but embeddings, every addition to the residual stream, and
logits are scaled by constants of the file.

Source: MiniCPM (Hu et al. 2024), 3.1; defaults for old files are llama.cpp's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from pyinfer import names
from pyinfer.gguf_file import GGUFFile
from pyinfer.models.checkpoint import TensorRule
from pyinfer.models.checkpoint_config import MOST, Config, keys_of, read_sizes
from pyinfer.models.checkpoint_decoder import Decoder, decoder_metadata, decoder_tensors
from pyinfer.models.hparams import HParams, Keys, read_hparams
from pyinfer.models.llama import with_gate
from pyinfer.program.builder import Builder, Weights
from pyinfer.program.program import Program

HF_ARCHITECTURES = ("MiniCPMForCausalLM",)
DECODER = Decoder("minicpm", "silu", neighbours=True, tied=True)


def hparams(file: GGUFFile) -> HParams:
    hp, keys = read_hparams(file, neox=False), Keys(file)
    usual = 1.4 / math.sqrt(hp.block_count)
    return replace(
        hp,
        embedding_scale=keys.number(names.EMBEDDING_SCALE, 12.0, 1e-9, 1e9),
        residual_scale=keys.number(names.RESIDUAL_SCALE, usual, 1e-9, 1e9),
        logit_scale=keys.number(names.LOGIT_SCALE, hp.embedding_length / 256, 1e-9, 1e9),
    )


def build(b: Builder, hp: HParams, w: Weights) -> Program:
    heads, kv_heads, size, epsilon = hp.head_count, hp.head_count_kv, hp.key_length, hp.layer_norm_rms_epsilon
    x = b.embed(w.token_embd, hp.embedding_length, hp.embedding_scale)
    for index, layer in enumerate(w.layers(hp.block_count)):
        h = b.rms_norm(x, layer.attn_norm, epsilon)
        q = b.rope(b.linear(h, layer.attn_q, heads * size), hp.rope, heads)
        k = b.rope(b.linear(h, layer.attn_k, kv_heads * size), hp.rope, kv_heads)
        v = b.linear(h, layer.attn_v, kv_heads * size)
        a = b.attend(index, q, k, v, heads=heads, kv_heads=kv_heads, scale=size**-0.5)
        a = b.linear(a, layer.attn_output, hp.embedding_length)
        x = b.add(x, b.scale(a, hp.residual_scale))
        h = b.rms_norm(x, layer.ffn_norm, epsilon)
        h = b.ffn(h, with_gate(layer), hp.activation or DECODER.activation, hp.feed_forward_length, raw=x)
        x = b.add(x, b.scale(h, hp.residual_scale))
    x = b.scale(b.rms_norm(b.select(x), w.output_norm, epsilon), 1.0 / hp.logit_scale)
    return b.finish(b.linear(x, w.output if w.has("output") else w.token_embd, hp.vocab_size))


def metadata(config: Mapping[str, Any]) -> dict[str, object]:
    """GGUF keys of a checkpoint with this config.json."""
    values = Config(config)
    values.refuse("num_experts", 0)
    sizes = read_sizes(values)
    depth = values.number("scale_depth", default=1.0, low=1e-9, high=1e9)
    base = values.integer("dim_model_base", default=1, high=MOST["width"])
    scales = {
        names.EMBEDDING_SCALE: values.number("scale_emb", default=1.0, low=1e-9, high=1e9),
        names.RESIDUAL_SCALE: depth / math.sqrt(sizes.block_count),
        names.LOGIT_SCALE: sizes.embedding_length / base,
    }
    return decoder_metadata(DECODER, config) | keys_of(DECODER.architecture, scales)


def tensors(config: Mapping[str, Any]) -> list[TensorRule]:
    """Where every tensor of the file comes from."""
    return decoder_tensors(DECODER, config)
