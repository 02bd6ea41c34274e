"""qwen3: Qwen 3. As qwen2 without biases; every head of q and k is normalized before it is rotated."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyinfer.gguf_file import GGUFFile
from pyinfer.models.checkpoint import TensorRule
from pyinfer.models.checkpoint_config import Config
from pyinfer.models.checkpoint_decoder import Decoder, decoder_metadata, decoder_tensors
from pyinfer.models.hparams import HParams, read_hparams
from pyinfer.models.llama import with_gate
from pyinfer.program.builder import Builder, Weights
from pyinfer.program.program import Program

HF_ARCHITECTURES = ("Qwen3ForCausalLM",)
DECODER = Decoder("qwen3", "silu", neighbours=False, head_norms=True)


def hparams(file: GGUFFile) -> HParams:
    return read_hparams(file, neox=True)


def build(b: Builder, hp: HParams, w: Weights) -> Program:
    heads, kv_heads, size, epsilon = hp.head_count, hp.head_count_kv, hp.key_length, hp.layer_norm_rms_epsilon
    x = b.embed(w.token_embd, hp.embedding_length)
    for index, layer in enumerate(w.layers(hp.block_count)):
        h = b.rms_norm(x, layer.attn_norm, epsilon)
        q = b.linear(h, layer.attn_q, heads * size)
        k = b.linear(h, layer.attn_k, kv_heads * size)
        v = b.linear(h, layer.attn_v, kv_heads * size)
        q = b.rope(b.rms_norm(q, layer.attn_q_norm, epsilon, heads), hp.rope, heads)
        k = b.rope(b.rms_norm(k, layer.attn_k_norm, epsilon, kv_heads), hp.rope, kv_heads)
        a = b.attend(index, q, k, v, heads=heads, kv_heads=kv_heads, scale=size**-0.5)
        x = b.add(x, b.linear(a, layer.attn_output, hp.embedding_length))
        h = b.rms_norm(x, layer.ffn_norm, epsilon)
        x = b.add(x, b.ffn(h, with_gate(layer), hp.activation or "silu", hp.feed_forward_length))
    x = b.rms_norm(b.select(x), w.output_norm, epsilon)
    return b.finish(b.linear(x, w.output if w.has("output") else w.token_embd, hp.vocab_size))


def metadata(config: Mapping[str, Any]) -> dict[str, object]:
    """GGUF keys of a checkpoint with this config.json."""
    Config(config).refuse("use_sliding_window", False)
    # Its heads are 128 wide whatever the others say; transformers' class has that as its default.
    return decoder_metadata(DECODER, {"head_dim": 128, **config})


def tensors(config: Mapping[str, Any]) -> list[TensorRule]:
    """Where every tensor of the file comes from."""
    return decoder_tensors(DECODER, {"head_dim": 128, **config})
