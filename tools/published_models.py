"""Published models that the families convert from: what of their config.json decides about sizes.

Configurations are those of the repositories. Parameters are the counts that publishers or the sizes of the
repositories' files state, None where only a rounded one is known: tests compare them with what the families
ask for. A model of which something is uncertain is not here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

# Where a sparsity is from: footnotes of the table in models.md.
SOURCES = {
    "powerinfer": "PowerInfer (Song et al., SOSP'24, [arXiv:2312.12456v2](https://arxiv.org/abs/2312.12456)),"
    " tables 1 and 3.",
    "prosparse": "ProSparse (Song et al. 2024, [arXiv:2402.13516](https://arxiv.org/abs/2402.13516))"
    " and the model's card.",
    "unknown": "ReLU or its square: many neurons do not fire, but we know of no published figure.",
}


@dataclass(frozen=True)
class Published:
    """One model. sparsity : percent of the neurons of feed-forward layers that do not fire, as text, "" where
    the activation is dense;  source : of the sparsity, a key of SOURCES
    """

    name: str
    repository: str
    config: dict[str, Any]
    parameters: int | None = None
    sparsity: str = ""
    source: str = ""


def _llama(*sizes: int, family: str = "Llama", **more: Any) -> dict[str, Any]:
    keys = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    keys += ("num_key_value_heads", "vocab_size")
    return {"architectures": [f"{family}ForCausalLM"], **dict(zip(keys, sizes)), **more}


def _falcon(*sizes: int, **more: Any) -> dict[str, Any]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads")
    return {"architectures": ["FalconForCausalLM"], **dict(zip(keys, sizes)), "vocab_size": 65_024, **more}


def _opt(*sizes: int, **more: Any) -> dict[str, Any]:
    keys = ("hidden_size", "num_hidden_layers", "num_attention_heads", "ffn_dim")
    given = dict(zip(keys, sizes))
    return {"architectures": ["OPTForCausalLM"], **given, "vocab_size": 50_272, **more}


_TIED: dict[str, Any] = {"tie_word_embeddings": True}
_LLAMA3_ROPE = {
    "rope_theta": 500_000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
_AFM_ROPE = {"rope_scaling": {"rope_type": "yarn", "factor": 20.0, "original_max_position_embeddings": 4096}}

_7B = (4096, 11008, 32, 32, 32, 32_000)
_13B = (5120, 13824, 40, 40, 40, 32_000)
_70B = (8192, 28672, 80, 64, 8, 32_000)
_MISTRAL = (4096, 14336, 32, 32, 8, 32_000)

_MODELS = (
    Published(
        "SmolLM2-135M",
        "HuggingFaceTB/SmolLM2-135M",
        _llama(576, 1536, 30, 9, 3, 49_152, **_TIED),
        134_515_008,
    ),
    Published(
        "Llama-3.2-1B",
        "meta-llama/Llama-3.2-1B",
        _llama(2048, 8192, 16, 32, 8, 128_256, **_TIED, **_LLAMA3_ROPE),
        1_235_814_400,
    ),
    Published("Llama-2-7B", "meta-llama/Llama-2-7b-hf", _llama(*_7B), 6_738_415_616),
    Published(
        "Mistral-7B-v0.1", "mistralai/Mistral-7B-v0.1", _llama(*_MISTRAL, family="Mistral"), 7_241_732_096
    ),
    Published(
        "ReluLLaMA-7B",
        "SparseLLM/ReluLLaMA-7B",
        _llama(*_7B, hidden_act="relu"),
        6_738_415_616,
        "70",
        "powerinfer",
    ),
    Published(
        "ReluLLaMA-13B",
        "SparseLLM/ReluLLaMA-13B",
        _llama(*_13B, hidden_act="relu"),
        13_015_864_320,
        "78",
        "powerinfer",
    ),
    Published(
        "ReluLLaMA-70B",
        "SparseLLM/ReluLLaMA-70B",
        _llama(*_70B, hidden_act="relu"),
        68_976_648_192,
        "82",
        "powerinfer",
    ),
    Published(
        "ProSparse-LLaMA-2-7B",
        "SparseLLM/prosparse-llama-2-7b",
        _llama(
            *_7B, family="SparseLlama", model_type="sparsellama", hidden_act="fatrelu", hidden_act_param=0.01
        ),
        6_738_415_616,
        "89.32",
        "prosparse",
    ),
    Published(
        "ProSparse-LLaMA-2-13B",
        "SparseLLM/prosparse-llama-2-13b",
        _llama(
            *_13B, family="SparseLlama", model_type="sparsellama", hidden_act="fatrelu", hidden_act_param=0.01
        ),
        13_015_864_320,
        "88.80",
        "prosparse",
    ),
    Published(
        "Qwen2.5-0.5B",
        "Qwen/Qwen2.5-0.5B",
        _llama(896, 4864, 24, 14, 2, 151_936, family="Qwen2", **_TIED),
        494_032_768,
    ),
    Published(
        "Qwen3-0.6B",
        "Qwen/Qwen3-0.6B",
        _llama(1024, 3072, 28, 16, 8, 151_936, family="Qwen3", head_dim=128, **_TIED),
        596_049_920,
    ),
    Published(
        "Gemma-3-1B",
        "google/gemma-3-1b-pt",
        _llama(1152, 6912, 26, 4, 1, 262_144, family="Gemma3"),
        999_885_952,
    ),
    Published("Falcon-7B", "tiiuae/falcon-7b", _falcon(4544, 32, 71), 6_921_720_704),
    Published(
        "Falcon-40B",
        "tiiuae/falcon-40b",
        _falcon(8192, 60, 128, num_kv_heads=8, new_decoder_architecture=True),
        41_303_293_952,
    ),
    Published("OPT-125M", "facebook/opt-125m", _opt(768, 12, 12, 3072), 125_239_296, "?", "unknown"),
    Published(
        "OPT-350M",
        "facebook/opt-350m",
        _opt(1024, 24, 16, 4096, word_embed_proj_dim=512, do_layer_norm_before=False),
        331_196_416,
        "?",
        "unknown",
    ),
    Published(
        "OPT-6.7B", "facebook/opt-6.7b", _opt(4096, 32, 32, 16384), 6_658_473_984, "96-98", "powerinfer"
    ),
    Published("OPT-30B", "facebook/opt-30b", _opt(7168, 48, 56, 28672), 29_974_540_288, "97", "powerinfer"),
    Published(
        "Minitron-4B",
        "nvidia/Minitron-4B-Base",
        _llama(3072, 9216, 32, 24, 8, 256_000, family="Nemotron", head_dim=128),
        None,
        "?",
        "unknown",
    ),
    Published(
        "AFM-4.5B",
        "arcee-ai/AFM-4.5B",
        _llama(2560, 18432, 36, 20, 4, 128_005, family="Arcee", head_dim=128, **_AFM_ROPE),
        None,
        "?",
        "unknown",
    ),
    Published(
        "Bamboo-7B",
        "PowerInfer/Bamboo-base-v0_1",
        _llama(*_MISTRAL, family="Bamboo", hidden_act="relu", sliding_window=4096),
        7_241_732_096,
        "90",
        "powerinfer",
    ),
    Published(
        "MiniCPM-2B",
        "openbmb/MiniCPM-2B-sft-bf16",
        _llama(2304, 5760, 40, 36, 36, 122_753, family="MiniCPM"),
        2_724_880_896,
    ),
    Published(
        "MiniCPM-S-1B",
        "openbmb/MiniCPM-S-1B-sft",
        _llama(
            *(1536, 3840, 52, 24, 8, 73_440), family="MiniCPM", hidden_act="fatrelu", hidden_act_param=0.03
        ),
        None,
        "87.89",
        "prosparse",
    ),
)
PUBLISHED = {model.name: model for model in _MODELS}
