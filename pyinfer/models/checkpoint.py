"""How a Hugging Face checkpoint becomes the tensors of a GGUF: rules that families write, and their
application.

A rule names one tensor of the file and the tensor of the checkpoint that it comes from. Rules never read:
`bind` checks them against what a checkpoint holds, and `load` reads and transforms one of them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from pyinfer import names
from pyinfer.errors import FormatError, UnsupportedError

Transform = Callable[[np.ndarray], np.ndarray]

# Tensors that checkpoints carry, but that a configuration implies or that belong to other modalities.
IGNORED = (
    r".*\.rotary_emb\.(inv_freq|cos_cached|sin_cached)",
    r".*\.(attn|attention|self_attention|self_attn)\.(bias|masked_bias)",
    r"(model\.)?decoder\.version",
    r"(model\.)?(vision_tower|vision_model|multi_modal_projector)\..*",
)

# Other spellings of one name: text models inside multimodal ones, and models saved without their head.
_SPELLINGS = (
    (re.compile(r"^language_model\.(model|lm_head)\."), r"\1."),
    (re.compile(r"^model\.language_model\."), "model."),
    (re.compile(r"^(decoder|layers|embed_tokens|norm)\."), r"model.\1."),
    (re.compile(r"^(h|word_embeddings|ln_f)\."), r"transformer.\1."),
)

_COMPARED_ROWS = 4096


@dataclass(frozen=True)
class TensorRule:
    """One tensor of the file.

    name : its GGUF name;  source : the checkpoint's name, "" for one that is made from config.json alone
    shape : expected numpy shape of the source (or of the given rows of it), -1 where any length will do
    transform : moves elements of a matrix, keeping shape and dtype; a vector is float32 and may be computed
    with; without a source it gets an empty array.  optional : the checkpoint may lack it
    rows : part of the source's rows;  unless_equal : a source whose equal makes this tensor superfluous
    """

    name: str
    source: str
    shape: tuple[int, ...]
    transform: Transform | None = None
    optional: bool = False
    rows: slice | None = None
    unless_equal: str = ""


class Source(Protocol):
    """What is asked of a checkpoint; `read` gives float16, float32, or the bits of BF16 as uint16."""

    @property
    def names(self) -> Collection[str]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def dtype(self, name: str) -> str: ...
    def read(self, name: str, rows: slice | None = None) -> np.ndarray: ...


class Rules:
    """Collects the rules of a family, in file order."""

    def __init__(self) -> None:
        self.list: list[TensorRule] = []

    def add(
        self,
        name: str,
        source: str,
        *shape: int,
        block: int | None = None,
        bias: bool = False,
        transform: Transform | None = None,
    ) -> None:
        """The weight of a module and, where it has one, its bias; both are transformed alike."""
        self.list.append(TensorRule(names.weight(name, block), f"{source}.weight", shape, transform))
        if bias:
            self.list.append(TensorRule(names.bias(name, block), f"{source}.bias", shape[:1], transform))

    def add_norm(
        self,
        name: str,
        source: str,
        length: int,
        block: int | None = None,
        transform: Transform | None = None,
    ) -> None:
        """Weight and bias of a LayerNorm; `transform` is for the weight only."""
        self.list.append(TensorRule(names.weight(name, block), f"{source}.weight", (length,), transform))
        self.list.append(TensorRule(names.bias(name, block), f"{source}.bias", (length,)))

    def add_head(self, source: str, embedding: str, rows: int, columns: int, tied: bool) -> None:
        """The output head. A tied one is written only where a checkpoint holds another matrix than the
        embedding, which transformers uses then.
        """
        self.list.append(
            TensorRule(
                names.weight(names.OUTPUT),
                f"{source}.weight",
                (rows, columns),
                optional=tied,
                unless_equal=f"{embedding}.weight" if tied else "",
            )
        )


def hf_architecture(config: Mapping[str, Any]) -> str | None:
    """The class of transformers that a checkpoint was saved from, if config.json names it."""
    given = config.get("architectures")
    return str(given[0]) if isinstance(given, list) and given else None


def family_of(config: Mapping[str, Any]) -> ModuleType:
    """The family that converts a checkpoint with this config.json. Raises UnsupportedError that lists the
    known architectures.
    """
    from pyinfer.models import names as family_names  # this module is one of those that are listed there

    families = [import_module(f"pyinfer.models.{name}") for name in family_names()]
    wanted = hf_architecture(config)
    for family in families:
        if wanted in family.HF_ARCHITECTURES:
            return family
    # Checkpoints with code of their own call their class as they like; the type says what it is.
    if wanted is None or wanted.endswith("ForCausalLM"):
        for family in families:
            if config.get("model_type") in getattr(family, "HF_MODEL_TYPES", ()):
                return family
    known = sorted(name for family in families for name in family.HF_ARCHITECTURES)
    found = f"architectures names {wanted!r}" if wanted else "architectures is missing"
    raise UnsupportedError(f"config.json: {found}; known are {', '.join(known)}")


def bind(rules: list[TensorRule], checkpoint: Source) -> list[TensorRule]:
    """The rules that a checkpoint fills, with its own tensor names and the shapes that it has.

    Raises FormatError for a tensor that is missing or has another shape, and UnsupportedError for one that
    no rule uses: it would change what the model computes.
    """
    spelled = {_spell(name): name for name in checkpoint.names}
    bound = []
    for rule in rules:
        if not rule.source:
            bound.append(rule)
            continue
        found = spelled.get(rule.source)
        if found is None and rule.optional:
            continue
        if found is None:
            raise FormatError(
                f"tensor {rule.source} is missing; the checkpoint holds {len(spelled)} tensors, "
                "perhaps not all of its files are there"
            )
        shape = _checked_shape(rule, found, checkpoint)
        if rule.unless_equal and _equal(found, spelled.get(rule.unless_equal), checkpoint):
            continue
        bound.append(replace(rule, source=found, shape=shape))
    used = {rule.source for rule in rules}
    for name in spelled:
        if name not in used and not any(re.fullmatch(pattern, name) for pattern in IGNORED):
            raise UnsupportedError(
                f"tensor {spelled[name]} has no place in this architecture, without it the model would "
                "compute something else; convert an unmodified checkpoint"
            )
    return bound


def load(rule: TensorRule, checkpoint: Source) -> np.ndarray:
    """The data of one bound rule: matrices in the checkpoint's type (BF16 as bits), vectors as float32."""
    if not rule.source:
        return _transformed(rule, np.empty(0, np.float32))
    array = checkpoint.read(rule.source, rule.rows)
    if array.ndim == 1:
        bits = checkpoint.dtype(rule.source) == "BF16"
        array = (array.astype(np.uint32) << 16).view(np.float32) if bits else array.astype(np.float32)
    return array if rule.transform is None else _transformed(rule, array)


def _transformed(rule: TensorRule, array: np.ndarray) -> np.ndarray:
    assert rule.transform is not None
    out = rule.transform(array)
    if out.shape != rule.shape:
        raise AssertionError(f"the transform of {rule.name} made {out.shape} of {rule.shape}")
    return out


def _spell(name: str) -> str:
    for pattern, spelling in _SPELLINGS:
        name = pattern.sub(spelling, name)
    return name


def _checked_shape(rule: TensorRule, found: str, checkpoint: Source) -> tuple[int, ...]:
    shape = tuple(checkpoint.shape(found))
    if rule.rows is not None:
        shape = (len(range(*rule.rows.indices(shape[0]))), *shape[1:])
    fits = len(shape) == len(rule.shape) and all(want in (-1, have) for want, have in zip(rule.shape, shape))
    if not fits:
        raise FormatError(
            f"tensor {found} has shape {list(shape)}, config.json promises {list(rule.shape)}; "
            "one of the two is of another model"
        )
    return shape


def _equal(name: str, other: str | None, checkpoint: Source) -> bool:
    if other is None or checkpoint.shape(name) != checkpoint.shape(other):
        return False
    rows = checkpoint.shape(name)[0]
    return all(
        np.array_equal(
            checkpoint.read(name, slice(first, min(rows, first + _COMPARED_ROWS))),
            checkpoint.read(other, slice(first, min(rows, first + _COMPARED_ROWS))),
        )
        for first in range(0, rows, _COMPARED_ROWS)
    )


def rotated_neighbours(heads: int) -> Transform:
    """Reorders the rows of q or k so that rope pairs neighbours: each head's two halves are interleaved."""

    def transform(array: np.ndarray) -> np.ndarray:
        halves = array.reshape(heads, 2, -1, *array.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(array.shape)

    return transform


def plus_one(array: np.ndarray) -> np.ndarray:
    """For norms that store their weight less one."""
    return array + np.float32(1)
