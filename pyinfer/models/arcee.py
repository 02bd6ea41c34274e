"""arcee: AFM. As llama, but the feed-forward layer has no gate and squares its ReLU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pyinfer.gguf_file import GGUFFile
from pyinfer.models.checkpoint import TensorRule
from pyinfer.models.checkpoint_decoder import Decoder, decoder_metadata, decoder_tensors
from pyinfer.models.hparams import HParams, read_hparams
from pyinfer.models.llama import build_decoder
from pyinfer.program.builder import Builder, Weights
from pyinfer.program.program import Program

HF_ARCHITECTURES = ("ArceeForCausalLM",)
DECODER = Decoder("arcee", "relu2", neighbours=True, gated=False)


def hparams(file: GGUFFile) -> HParams:
    return read_hparams(file, neox=False)


def build(b: Builder, hp: HParams, w: Weights) -> Program:
    return build_decoder(b, hp, w, DECODER)


def metadata(config: Mapping[str, Any]) -> dict[str, object]:
    """GGUF keys of a checkpoint with this config.json."""
    return decoder_metadata(DECODER, config)


def tensors(config: Mapping[str, Any]) -> list[TensorRule]:
    """Where every tensor of the file comes from."""
    return decoder_tensors(DECODER, config)
