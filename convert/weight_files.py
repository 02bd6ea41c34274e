"""Which files of a checkpoint hold its weights: safetensors before torch's own format, shards by their index.

Source: transformers (SAFE_WEIGHTS_NAME and its like).
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

INDEX_SUFFIX = ".index.json"
_FORMS = (
    ("model.safetensors", re.compile(r"model-\d{5}-of-\d{5}\.safetensors")),
    ("pytorch_model.bin", re.compile(r"pytorch_model-\d{5}-of-\d{5}\.bin")),
)


@dataclass(frozen=True)
class WeightFiles:
    """files : names, of all shards that are there;  index : name of the file that says which tensor is "
    "where."""

    files: list[str]
    index: str | None = None


def find_weights(names: Collection[str]) -> WeightFiles:
    """The weights among the files of a folder; no files where there are none."""
    for whole, shard in _FORMS:
        shards = sorted(name for name in names if shard.fullmatch(name))
        if whole in names:
            return WeightFiles([whole])
        if whole + INDEX_SUFFIX in names:
            return WeightFiles(shards, whole + INDEX_SUFFIX)
        if shards:
            count = int(shards[0].rpartition("-of-")[2].partition(".")[0])
            stem, suffix = whole.split(".")
            return WeightFiles([f"{stem}-{part:05d}-of-{count:05d}.{suffix}" for part in range(1, count + 1)])
    return WeightFiles([])
