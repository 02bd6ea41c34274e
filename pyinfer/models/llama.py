"""llama: Llama 1 to 3 (rope scaling included), Mistral, TinyLlama, SmolLM2. Rotates neighbours; its q and k
rows are permuted for that.
"""

from __future__ import annotations

from pyinfer.gguf_file import GGUFFile
from pyinfer.models.hparams import HParams, read_hparams
from pyinfer.program.builder import Builder, Weights
from pyinfer.program.program import Program


def hparams(file: GGUFFile) -> HParams:
    return read_hparams(file, neox=False)


def build(b: Builder, hp: HParams, w: Weights) -> Program:
    heads, kv_heads, size, epsilon = hp.head_count, hp.head_count_kv, hp.key_length, hp.layer_norm_rms_epsilon
    x = b.embed(w.token_embd, hp.embedding_length)
    for index, layer in enumerate(w.layers(hp.block_count)):
        h = b.rms_norm(x, layer.attn_norm, epsilon)
        q = b.linear(h, layer.attn_q, heads * size)
        k = b.linear(h, layer.attn_k, kv_heads * size)
        v = b.linear(h, layer.attn_v, kv_heads * size)
        q, k = b.rope(q, hp.rope, heads), b.rope(k, hp.rope, kv_heads)
        a = b.attend(
            index, q, k, v, heads=heads, kv_heads=kv_heads, scale=size**-0.5, window=hp.sliding_window
        )
        x = b.add(x, b.linear(a, layer.attn_output, hp.embedding_length))
        h = b.rms_norm(x, layer.ffn_norm, epsilon)
        x = b.add(x, b.ffn(h, layer, "silu", hp.feed_forward_length))
    x = b.rms_norm(b.select(x), w.output_norm, epsilon)
    return b.finish(b.linear(x, w.output if w.has("output") else w.token_embd, hp.vocab_size))
