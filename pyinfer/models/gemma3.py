"""gemma3 (text): embeddings scaled by the root of their width, norms around both sublayers, q and k
normalized per head.

Every sixth layer sees everything and rotates with freq_base (scaled); the others see the last
`sliding_window` positions and rotate with base 10000. The norms' +1 is already in the file's weights.
"""

from __future__ import annotations

from dataclasses import replace
from math import sqrt

from pyinfer import names
from pyinfer.gguf_file import GGUFFile
from pyinfer.models.hparams import HParams, Keys, read_hparams
from pyinfer.program.builder import Builder, Weights
from pyinfer.program.program import Program
from pyinfer.program.rope import Rope

LAYERS_PER_GLOBAL = 6
LOCAL_FREQ_BASE = 10000.0
BLOCKS_27B = (
    62  # the one size whose queries are scaled by width / heads, not by the head size; no key says so
)


def hparams(file: GGUFFile) -> HParams:
    hp = read_hparams(file, neox=True)
    Keys(file).integer(names.SLIDING_WINDOW, None, 1, 1 << 31)  # without it the local layers are undefined
    return hp


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
        h = b.ffn(b.rms_norm(x, layer.ffn_norm, epsilon), layer, "gelu", hp.feed_forward_length)
        x = b.add(x, b.rms_norm(h, layer.post_ffw_norm, epsilon))
    x = b.rms_norm(b.select(x), w.output_norm, epsilon)
    return b.finish(b.linear(x, w.output if w.has("output") else w.token_embd, hp.vocab_size))
