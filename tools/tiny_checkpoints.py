"""Make tests/golden/hf: tiny random Hugging Face checkpoints of every family, with logits computed by
transformers.

    python -m pyinfer_tools.tiny_checkpoints [--only NAME] [-o FOLDER]

Each folder holds config.json, model.safetensors, a tokenizer and logits.npz (tokens int32 [T], logits float32
[T, V]). What transformers lacks (dReLU, FATReLU, MiniCPM's scales) is added to its nearest model by hooks, so
that the logits share no code with pyinfer. Needs the extra `[oracle]`.

Source: transformers; Bamboo's and ProSparse's model cards; MiniCPM (Hu et al. 2024), 3.1.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import click
import numpy as np

from pyinfer.errors import MissingExtraError
from pyinfer_tools.tiny_tokenizer import byte_level_files

TOKENS = 40
VOCABULARY = 272
MOST_BYTES = 300_000
_ENDS = {"bos_token_id": VOCABULARY - 3, "eos_token_id": VOCABULARY - 3}
FOLDER = Path("tests/golden/hf")  # of a checkout, in which the tool is run


@dataclass(frozen=True)
class Tiny:
    """One checkpoint.

    model : class of transformers, without ForCausalLM;  config : what differs from the sizes that all share
    written : what config.json says instead, null removes a key;  adapt(model) : makes it another architecture
    half : F16 weights, otherwise BF16
    vocabulary_files : vocab.json and merges.txt instead of tokenizer.json
    """

    name: str
    model: str
    config: dict
    written: dict = field(default_factory=dict)
    adapt: Callable | None = None
    half: bool = True
    vocabulary_files: bool = False


def _sizes(**changes) -> dict:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
    }
    return {**sizes, **_ENDS, **changes}


def _rope(kind: str = "default", theta: float = 10_000.0, **more) -> dict:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **more}}


def _old_rope(theta: float = 10_000.0, **scaling) -> dict:
    """How configurations spelled rotation before transformers 5."""
    return {"rope_parameters": None, "rope_theta": theta, "rope_scaling": scaling or None}


def _falcon(**changes) -> dict:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    return {**sizes, **_ENDS, "ffn_hidden_size": 96, "max_position_embeddings": 256, **changes}


def _opt(**changes) -> dict:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"ffn_dim": 96, "max_position_embeddings": 64, "word_embed_proj_dim": 64}
    return {**sizes, **_ENDS, **changes}


def _layers(model):
    return model.model.layers


def _fatrelu(threshold: float) -> Callable:
    def adapt(model) -> None:
        torch, _ = _transformers()
        for layer in _layers(model):
            layer.mlp.act_fn.register_forward_hook(
                lambda module, given, out: torch.where(given[0] > threshold, given[0], 0.0)
            )

    return adapt


def _double_relu(model) -> None:
    for layer in _layers(model):
        layer.mlp.up_proj.register_forward_hook(lambda module, given, out: out.relu())


def _with_predictors(model) -> None:
    """TurboSparse: dReLU, and predictors of another size in each layer, which dense logits do not need."""
    torch, _ = _transformers()
    _double_relu(model)
    for index, layer in enumerate(_layers(model)):
        rank, width, neurons = 16 * (index + 1), model.config.hidden_size, model.config.intermediate_size
        layer.mlp.predictor = torch.nn.Module()
        layer.mlp.predictor.fc1 = torch.nn.Linear(width, rank, bias=False)
        layer.mlp.predictor.fc2 = torch.nn.Linear(rank, neurons, bias=False)


_MINICPM = {"scale_emb": 6, "scale_depth": 1.9, "dim_model_base": 16}


def _minicpm(threshold: float | None = None) -> Callable:
    def adapt(model) -> None:
        config = model.config
        depth = _MINICPM["scale_depth"] / math.sqrt(config.num_hidden_layers)
        model.model.embed_tokens.register_forward_hook(lambda m, given, out: out * _MINICPM["scale_emb"])
        for layer in _layers(model):
            layer.mlp.register_forward_hook(lambda m, given, out: out * depth)
            layer.self_attn.register_forward_hook(lambda m, given, out: (out[0] * depth, *out[1:]))
        divisor = config.hidden_size / _MINICPM["dim_model_base"]
        model.lm_head.register_forward_pre_hook(lambda m, given: (given[0] / divisor,))
        if threshold is not None:
            _fatrelu(threshold)(model)

    return adapt


def _named(architecture: str, model_type: str, **more) -> dict:
    return {"architectures": [architecture], "model_type": model_type, **more}


_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 24.0}
_WIDE_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 48}  # 96 of 64
_GEMMA3 = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 7,
    "head_dim": 32,
    "query_pre_attn_scalar": 32,
    "num_key_value_heads": 1,
    "hidden_activation": "gelu_pytorch_tanh",
    "sliding_window": 8,
    "tie_word_embeddings": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
    },
}

TINY = [
    Tiny("llama", "Llama", _sizes(**_rope())),
    Tiny(
        "llama_bias",
        "Llama",
        _sizes(**_rope(), attention_bias=True, mlp_bias=True, **_WIDE_HEADS),
        half=False,
    ),
    Tiny(
        "llama_rope_llama3",
        "Llama",
        _sizes(**_rope("llama3", 5e4, **_LLAMA3), tie_word_embeddings=True),
        _old_rope(5e4, rope_type="llama3", **_LLAMA3),
    ),
    Tiny("mistral", "Mistral", _sizes(**_rope(), sliding_window=8)),
    Tiny("relu_llama", "Llama", _sizes(**_rope(), hidden_act="relu"), _old_rope()),
    # Large thresholds would make logits jump wherever rounding carries a neuron across.
    Tiny(
        "prosparse_llama",
        "Llama",
        _sizes(**_rope(), hidden_act="relu"),
        _named("SparseLlamaForCausalLM", "sparsellama", hidden_act="fatrelu", hidden_act_param=0.01),
        _fatrelu(0.01),
    ),
    Tiny(
        "mistral_drelu",
        "Mistral",
        _sizes(**_rope(), hidden_act="relu", sliding_window=None),
        {"hidden_act": "drelu"},
        _double_relu,
    ),
    Tiny(
        "bamboo",
        "Mistral",
        _sizes(**_rope(), hidden_act="relu", sliding_window=None, tie_word_embeddings=True),
        _named("BambooForCausalLM", "bamboo") | _old_rope(),
        _double_relu,
    ),
    Tiny(
        "turbosparse_mistral",
        "Mistral",
        _sizes(**_rope(), hidden_act="relu", sliding_window=16),
        _named("BambooForCausalLM", "bamboo"),
        _with_predictors,
        half=False,
    ),
    Tiny("qwen2", "Qwen2", _sizes(**_rope(theta=1e6), tie_word_embeddings=True)),
    Tiny("qwen2_yarn", "Qwen2", _sizes(**_rope("yarn", **_YARN), tie_word_embeddings=True), half=False),
    Tiny("qwen3", "Qwen3", _sizes(**_rope(theta=1e6), **_WIDE_HEADS)),
    Tiny("gemma3", "Gemma3", _sizes(**_GEMMA3)),
    Tiny("falcon_7b", "Falcon", _falcon(multi_query=True)),
    Tiny(
        "falcon_40b",
        "Falcon",
        _falcon(new_decoder_architecture=True, num_kv_heads=2, tie_word_embeddings=False),
    ),
    Tiny(
        "falcon_40b_relu",
        "Falcon",
        _falcon(new_decoder_architecture=True, num_kv_heads=2, activation="relu", bias=True),
    ),
    Tiny(
        "falcon_11b",
        "Falcon",
        _falcon(
            new_decoder_architecture=True,
            num_kv_heads=2,
            num_ln_in_parallel_attn=1,
            **_rope(theta=500_042.0),
        ),
        half=False,
    ),
    Tiny(
        "falcon_rw",
        "Falcon",
        _falcon(multi_query=False),
        _named("RWForCausalLM", "RefinedWeb", n_head=4, n_layer=2, n_head_kv=4)
        | {"num_attention_heads": None, "num_hidden_layers": None, "num_kv_heads": None},
    ),
    Tiny("opt", "OPT", _opt(), vocabulary_files=True),
    Tiny(
        "opt_350m",
        "OPT",
        _opt(do_layer_norm_before=False, word_embed_proj_dim=32),
        vocabulary_files=True,
    ),
    Tiny(
        "galactica",
        "OPT",
        _opt(enable_bias=False, layer_norm_elementwise_affine=False, activation_function="gelu"),
    ),
    Tiny("nemotron", "Nemotron", _sizes(**_rope(partial_rotary_factor=0.5), norm_eps=1e-5, head_dim=16)),
    Tiny(
        "nemotron_bias",
        "Nemotron",
        _sizes(
            **_rope(theta=5e4, partial_rotary_factor=0.25),
            norm_eps=1e-5,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=32,
            attention_bias=True,
            mlp_bias=True,
        ),
        {**_old_rope(5e4), "partial_rotary_factor": 0.25},
        half=False,
    ),
    Tiny("arcee", "Arcee", _sizes(**_rope(), hidden_act="relu2")),
    Tiny(
        "arcee_yarn",
        "Arcee",
        _sizes(**_rope("yarn", **_YARN), hidden_act="relu2", tie_word_embeddings=True),
        _old_rope(type="yarn", **_YARN),
    ),
    Tiny(
        "minicpm",
        "Llama",
        _sizes(**_rope(), tie_word_embeddings=True),
        _named("MiniCPMForCausalLM", "minicpm", **_MINICPM, tie_word_embeddings=None) | _old_rope(),
        _minicpm(),
    ),
    Tiny(
        "minicpm_s",
        "Llama",
        _sizes(**_rope(), hidden_act="relu"),
        _named("MiniCPMForCausalLM", "minicpm", **_MINICPM, hidden_act="fatrelu", hidden_act_param=0.02)
        | _old_rope(),
        _minicpm(0.02),
    ),
]


def _transformers():
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingExtraError(
            "torch and transformers are missing, tiny checkpoints need them; "
            "run: pip install 'pyinfer[oracle]'"
        ) from error
    return torch, transformers


def make_model(tiny: Tiny, seed: int = 20):
    """The transformers model; its random weights all influence the logits and are what a file can store."""
    torch, transformers = _transformers()
    suffix = "Text" if tiny.model == "Gemma3" else ""
    config = getattr(transformers, f"{tiny.model}{suffix}Config")(**tiny.config)
    config._attn_implementation = "eager"
    model = getattr(transformers, f"{tiny.model}ForCausalLM")(config)
    if tiny.adapt:
        tiny.adapt(model)
    generator = torch.Generator().manual_seed(seed)
    stored = torch.float16 if tiny.half else torch.bfloat16
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("bias"):
                value = 0.3 * noise
            elif weight.dim() == 1:
                value = 0.2 * noise + (0.0 if tiny.model in ("Gemma3", "Nemotron") else 1.0)
            else:
                value = noise * (1.4 / math.sqrt(weight.shape[1]))
            weight.copy_(value.to(stored))
    return model.eval()


def golden_logits(model, tokens: np.ndarray) -> np.ndarray:
    """Logits float32 [T, V], computed in float64 as far as transformers keeps to it."""
    torch, _ = _transformers()
    with torch.no_grad():
        out = model.double()(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False)
    return out.logits[0].float().numpy()


def write_checkpoint(tiny: Tiny, folder: Path) -> np.ndarray:
    """Write the folder; returns the logits."""
    torch, transformers = _transformers()
    transformers.utils.logging.disable_progress_bar()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model = make_model(tiny)
    tokens = np.random.default_rng(7).integers(0, VOCABULARY, TOKENS).astype(np.int32)
    logits = golden_logits(model, tokens)  # first: storing rounds the rotation's frequencies too
    model.to(torch.float16 if tiny.half else torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    _edit_config(folder / "config.json", tiny.written)
    for name, text in byte_level_files(VOCABULARY, apart=tiny.vocabulary_files).items():
        (folder / name).write_text(text, encoding="utf-8")
    np.savez_compressed(folder / "logits.npz", tokens=tokens, logits=logits)
    return logits


def _edit_config(path: Path, changes: dict) -> None:
    config = json.loads(path.read_text(encoding="utf-8")) | changes
    config = {key: value for key, value in config.items() if value is not None or key not in changes}
    path.write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@click.command()
@click.option("-o", "--output", type=click.Path(path_type=Path, file_okay=False), default=FOLDER)
@click.option("--only", type=click.Choice([tiny.name for tiny in TINY]), help="Make one checkpoint.")
def main(output: Path, only: str | None) -> None:
    """Make tiny checkpoints of every family and their logits by transformers."""
    large = []
    for tiny in TINY:
        if only and tiny.name != only:
            continue
        logits = write_checkpoint(tiny, output / tiny.name)
        size = folder_bytes(output / tiny.name)
        click.echo(f"{tiny.name}: {size:,} bytes, logits deviate by {logits.std():.2f}", err=True)
        if size > MOST_BYTES:
            large.append(tiny.name)
    if large:
        raise click.ClickException(f"{', '.join(large)}: more than {MOST_BYTES:,} bytes")


if __name__ == "__main__":
    main()
