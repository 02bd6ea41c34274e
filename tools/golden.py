"""Make tests/golden: tiny random models of every dense family, with logits computed by transformers.

    python -m pyinfer_tools.golden [--only NAME] [-o FOLDER]

Each model is written as GGUF with the keys and tensor names that llama.cpp's converter writes, and read back
by llama.cpp, whose logits must agree; so names and keys are checked by a reader that shares no code with this
writer. Needs the extras `[oracle]` and `[peers]`.

Source: llama.cpp, convert_hf_to_gguf.py (names, keys, order of q and k rows), gguf-py constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import gguf
import numpy as np

from pyinfer.errors import MissingExtraError
from pyinfer_tools.llama_cpp import Peer
from pyinfer_tools.vocabularies import add_byte_level, add_sentencepiece

_TOKENS = 40
_CONTEXT = 256
_MAX_BYTES = 600_000
_FOLDER = Path("tests/golden")  # of a checkout, in which the tool is run

_BLOCK_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_GEMMA_NAMES = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


@dataclass(frozen=True)
class Golden:
    """One tiny model.

    branch : factor on gemma's norms behind attention and FFN: how much a layer adds to the residual
    tolerance : largest deviation of llama.cpp, relative to the largest logit
    checked : how many of the first positions llama.cpp must agree on; fewer than all where it lacks a feature
    """

    name: str
    family: str  # of transformers, e.g. "Qwen2"
    architecture: str  # of GGUF
    config: dict = field(default_factory=dict)
    keys: Callable[[object, gguf.GGUFWriter], None] = lambda config, writer: None
    branch: float = 1.0
    tolerance: float = 1e-5
    checked: int = _TOKENS


def _config(**changes) -> dict:
    sizes = {
        "vocab_size": 288,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": _CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return {**sizes, **changes}


def _rope(kind: str = "default", theta: float = 10_000.0, **more) -> dict:
    return {"rope_type": kind, "rope_theta": theta, **more}


_LLAMA3 = _rope(
    "llama3",
    50_000.0,
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
_GEMMA3 = {
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 8,
    "tie_word_embeddings": True,
}


def _sliding_window(config, writer: gguf.GGUFWriter) -> None:
    writer.add_sliding_window(config.sliding_window)


def _linear_scaling(config, writer: gguf.GGUFWriter) -> None:
    writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
    writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _gemma3_keys(config, writer: gguf.GGUFWriter) -> None:
    _sliding_window(config, writer)
    writer.add_rope_freq_base_swa(config.rope_parameters["sliding_attention"]["rope_theta"])
    factor = config.rope_parameters["full_attention"].get("factor")
    if factor:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(factor)


GOLDEN = [
    Golden("llama", "Llama", "llama", _config(rope_parameters=_rope())),
    Golden("llama_rope_llama3", "Llama", "llama", _config(rope_parameters=_LLAMA3, tie_word_embeddings=True)),
    Golden(
        "llama_rope_linear",
        "Llama",
        "llama",
        _config(rope_parameters=_rope("linear", factor=4.0)),
        _linear_scaling,
    ),
    Golden(
        "llama_bias", "Llama", "llama", _config(rope_parameters=_rope(), attention_bias=True, mlp_bias=True)
    ),
    # llama.cpp ignores the window of this architecture: only the first window's positions can agree.
    Golden(
        "mistral",
        "Mistral",
        "llama",
        _config(rope_parameters=_rope(), sliding_window=8, head_dim=16, num_hidden_layers=3),
        _sliding_window,
        checked=8,
    ),
    Golden("qwen2", "Qwen2", "qwen2", _config(rope_parameters=_rope(theta=1e6), tie_word_embeddings=True)),
    Golden(
        "qwen3",
        "Qwen3",
        "qwen3",
        _config(rope_parameters=_rope(theta=1e6), head_dim=32, num_key_value_heads=1),
    ),
    Golden(
        "gemma3",
        "Gemma3",
        "gemma3",
        _config(
            **_GEMMA3,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=7,
            head_dim=32,
            query_pre_attn_scalar=32,
            num_key_value_heads=1,
            rope_parameters={"full_attention": _rope(theta=1e6), "sliding_attention": _rope()},
        ),
        _gemma3_keys,
        tolerance=2e-3,  # llama.cpp's GELU is a table of halves
    ),
    # 62 layers are how llama.cpp knows the 27B model, whose queries are scaled by hidden / heads.
    Golden(
        "gemma3_27b",
        "Gemma3",
        "gemma3",
        _config(
            **_GEMMA3,
            hidden_size=16,
            intermediate_size=8,
            num_hidden_layers=62,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=8,
            rope_parameters={
                "full_attention": _rope("linear", 1e6, factor=8.0),
                "sliding_attention": _rope(),
            },
        ),
        _gemma3_keys,
        branch=0.3,  # 62 layers of full weight would amplify every rounding
        tolerance=5e-3,
    ),
]


def _transformers():
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "torch and transformers are missing, golden values need them; run: pip install 'pyinfer[oracle]'"
        ) from error
    return torch, transformers


def make_model(golden: Golden, seed: int = 20):
    """The transformers model in float32 with random weights that all influence the logits."""
    torch, transformers = _transformers()
    suffix = "Text" if golden.family.startswith("Gemma3") else ""
    config = getattr(transformers, f"{golden.family}{suffix}Config")(**golden.config)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{golden.family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name:
                weight.copy_(1.0 + 0.2 * noise)
                if golden.architecture == "gemma3":  # which adds the one itself
                    if "post_" in name:
                        weight.mul_(golden.branch)
                    weight.sub_(1.0)
            elif name.endswith("bias"):
                weight.copy_(0.3 * noise)
            else:
                weight.copy_(noise * (1.4 / math.sqrt(weight.shape[1])))
    return model.eval()


def golden_logits(model, tokens: np.ndarray) -> np.ndarray:
    """Logits float32 [T, V], computed in float64 as far as transformers keeps to it."""
    torch, _ = _transformers()
    with torch.no_grad():
        out = model.double()(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False)
    return out.logits[0].float().numpy()


def tensor_name(name: str, architecture: str) -> str:
    """The GGUF name of a transformers parameter."""
    stem, _, kind = name.rpartition(".")
    if stem in _TOP_NAMES:
        return f"{_TOP_NAMES[stem]}.{kind}"
    _, _, layer, part = stem.split(".", 3)
    names = {**_BLOCK_NAMES, **_GEMMA_NAMES} if architecture == "gemma3" else _BLOCK_NAMES
    return f"blk.{layer}.{names[part]}.{kind}"


def rotated_pairs(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k in llama order: each head's halves interleaved, so that rope pairs are neighbours."""
    half = weight.shape[0] // heads // 2
    split = weight.reshape(heads, 2, half, *weight.shape[1:])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)


def llama3_factors(config) -> np.ndarray:
    """Divisors float32 [C / 2] of the rope frequencies, as llama.cpp stores them in rope_freqs.weight."""
    rope = config.rope_parameters
    half = np.arange(config.head_dim // 2, dtype=np.float64)
    wavelength = 2 * np.pi * rope["rope_theta"] ** (2 * half / config.head_dim)
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    blend = (rope["original_max_position_embeddings"] / wavelength - low) / (high - low)
    blend = np.clip(blend, 0.0, 1.0)
    return (1.0 / (blend + (1.0 - blend) / factor)).astype(np.float32)


def write_gguf(golden: Golden, model, path: Path) -> None:
    """Write the model's float32 weights as GGUF."""
    config = model.config
    writer = gguf.GGUFWriter(path, golden.architecture)
    _add_keys(golden, config, writer)
    if golden.architecture.startswith("qwen"):
        add_byte_level(writer, config.vocab_size, "qwen2")
    else:
        add_sentencepiece(writer, config.vocab_size)
    if isinstance(config.rope_parameters, dict) and config.rope_parameters.get("rope_type") == "llama3":
        writer.add_tensor("rope_freqs.weight", llama3_factors(config))
    for name, parameter in model.named_parameters():
        weight = parameter.detach().float().numpy().copy()
        if golden.architecture == "llama" and ".q_proj." in name:
            weight = rotated_pairs(weight, config.num_attention_heads)
        if golden.architecture == "llama" and ".k_proj." in name:
            weight = rotated_pairs(weight, config.num_key_value_heads)
        if golden.architecture == "gemma3" and "norm" in name:
            weight += 1.0
        writer.add_tensor(tensor_name(name, golden.architecture), weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_keys(golden: Golden, config, writer: gguf.GGUFWriter) -> None:
    rope = config.rope_parameters
    rope = rope.get("full_attention", rope)
    writer.add_name(f"tiny random {golden.name}")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    if golden.config.get("head_dim"):
        writer.add_key_length(config.head_dim)
        writer.add_value_length(config.head_dim)
    if golden.architecture == "llama":
        writer.add_vocab_size(config.vocab_size)
        writer.add_rope_dimension_count(config.head_dim)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    golden.keys(config, writer)


def difference(golden: Golden, path: Path, tokens: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """Largest deviation of llama.cpp per position, float64 [T], relative to the largest logit."""
    with Peer(path, n_ctx=_CONTEXT, n_threads=1, exact=True) as peer:
        found = peer.logits(tokens.tolist())
    return np.abs(found - logits).max(axis=1) / np.abs(logits).max()


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), default=_FOLDER)
@click.option("--only", type=click.Choice([golden.name for golden in GOLDEN]), help="Make one model.")
def main(output: Path, only: str | None) -> None:
    """Make tiny models of every dense family and their logits by transformers."""
    output.mkdir(parents=True, exist_ok=True)
    wrong = []
    for golden in GOLDEN:
        if only and golden.name != only:
            continue
        model = make_model(golden)
        path = output / f"{golden.name}.gguf"
        write_gguf(golden, model, path)
        tokens = np.random.default_rng(7).integers(3, 285, _TOKENS).astype(np.int32)
        logits = golden_logits(model, tokens)
        np.savez_compressed(output / f"{golden.name}.npz", tokens=tokens, logits=logits)
        apart = difference(golden, path, tokens, logits)
        worst = float(apart[: golden.checked].max())
        click.echo(
            f"{golden.name}: {path.stat().st_size:,} bytes, logits deviate by {logits.std():.2f}, "
            f"llama.cpp differs by {worst:.1e} in the first {golden.checked}, {apart.max():.1e} in all",
            err=True,
        )
        if worst > golden.tolerance or path.stat().st_size > _MAX_BYTES:
            wrong.append(golden.name)
    if wrong:
        raise click.ClickException(f"{', '.join(wrong)}: too large, or llama.cpp computes other logits")


if __name__ == "__main__":
    main()
