"""llama: Llama 1 to 3 (rope scaling included), Mistral, TinyLlama, SmolLM2. Rotates neighbours; its q and k
rows are permuted for that.

With another activation in the file: ReluLLaMA (relu), ProSparse-LLaMA-2 (fatrelu).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyinfer.gguf_file import GGUFFile
from pyinfer.models.checkpoint import TensorRule, hf_architecture
from pyinfer.models.checkpoint_decoder import Decoder, decoder_metadata, decoder_tensors, window_keys
from pyinfer.models.hparams import HParams, read_hparams
from pyinfer.program.builder import Builder, Weights
from pyinfer.program.program import Program

HF_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM")
HF_MODEL_TYPES = ("llama", "mistral", "sparsellama")
DECODER = Decoder("llama", "silu", neighbours=True)


def hparams(file: GGUFFile) -> HParams:
    return read_hparams(file, neox=False)


def build(b: Builder, hp: HParams, w: Weights) -> Program:
    return build_decoder(b, hp, w, DECODER)


def with_gate(layer: Weights) -> Weights:
    """The layer. Raises FormatError where its gate is missing: `ffn` would take it for one that has none."""
    _ = layer.ffn_gate
    return layer


def build_decoder(b: Builder, hp: HParams, w: Weights, decoder: Decoder) -> Program:
    """Also of relatives that differ in tensors, rotation and activation only."""
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
        layer = with_gate(layer) if decoder.gated else layer
        h = b.ffn(h, layer, hp.activation or decoder.activation, hp.feed_forward_length, raw=x)
        x = b.add(x, h)
    x = b.rms_norm(b.select(x), w.output_norm, epsilon)
    return b.finish(b.linear(x, w.output if w.has("output") else w.token_embd, hp.vocab_size))


def metadata(config: Mapping[str, Any]) -> dict[str, object]:
    """GGUF keys of a checkpoint with this config.json."""
    keys = decoder_metadata(DECODER, config)
    # Llama's class knows no window, whatever its configuration says.
    is_mistral = hf_architecture(config) == "MistralForCausalLM" or config.get("model_type") == "mistral"
    return keys | (window_keys(DECODER, config) if is_mistral else {})


def tensors(config: Mapping[str, Any]) -> list[TensorRule]:
    """Where every tensor of the file comes from."""
    return decoder_tensors(DECODER, config)
