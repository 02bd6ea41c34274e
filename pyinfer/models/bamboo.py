"""bamboo: Bamboo and TurboSparse-Mistral. As llama, but ReLU applies to gate and up alike (dReLU).

The name is PowerInfer's. TurboSparse checkpoints bring their predictors, which go into the file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyinfer import names
from pyinfer.errors import UnsupportedError
from pyinfer.gguf_file import GGUFFile
from pyinfer.models.checkpoint import TensorRule
from pyinfer.models.checkpoint_config import Config, read_sizes
from pyinfer.models.checkpoint_decoder import Decoder, decoder_metadata, decoder_tensors, window_keys
from pyinfer.models.hparams import HParams, read_hparams
from pyinfer.models.llama import build_decoder
from pyinfer.program.builder import Builder, Weights
from pyinfer.program.program import Program

HF_ARCHITECTURES = ("BambooForCausalLM",)
DECODER = Decoder("bamboo", "drelu", neighbours=True)


def hparams(file: GGUFFile) -> HParams:
    return read_hparams(file, neox=False)


def build(b: Builder, hp: HParams, w: Weights) -> Program:
    return build_decoder(b, hp, w, DECODER)


def metadata(config: Mapping[str, Any]) -> dict[str, object]:
    """GGUF keys of a checkpoint with this config.json."""
    activation = config.get("hidden_act", "relu")
    if activation not in ("relu", "drelu"):
        raise UnsupportedError(f"config.json: hidden_act is {activation!r}, Bamboo's layers apply relu twice")
    return decoder_metadata(DECODER, {**config, "hidden_act": "drelu"}) | window_keys(DECODER, config)


def tensors(config: Mapping[str, Any]) -> list[TensorRule]:
    """Where every tensor of the file comes from; predictors last, as PowerInfer orders them."""
    sizes = read_sizes(Config(config))
    rules = decoder_tensors(DECODER, config)
    for block in range(sizes.block_count):
        prefix = f"model.layers.{block}.mlp.predictor."
        for name, shape in (
            (names.FC1, (-1, sizes.embedding_length)),
            (names.FC2, (sizes.feed_forward_length, -1)),
        ):
            source = f"{prefix}{name}.weight"
            rules.append(TensorRule(names.weight(name, block), source, shape, optional=True))
    return rules
