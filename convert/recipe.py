"""Which tensor gets which type, and why: one table.

The first rule whose pattern fits a tensor's name decides. A type whose blocks the columns do not fill gives
way to the next one of LADDER, and the summary of a conversion says so.

Source: the choices of llama.cpp's quantizer where it has the same types, so that its files and ours compare.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from pyinfer.names import BLOCK, FC1, FC2, GGMLType


@dataclass(frozen=True)
class Quant:
    """What --quant names: the type of most matrices; file_type is llama.h's number for such a file."""

    name: str
    type: GGMLType
    file_type: int


_QUANTS = (
    Quant("q4_0", GGMLType.Q4_0, 2),
    Quant("q4_1", GGMLType.Q4_1, 3),
    Quant("q5_0", GGMLType.Q5_0, 8),
    Quant("q5_1", GGMLType.Q5_1, 9),
    Quant("q8_0", GGMLType.Q8_0, 7),
    Quant("f16", GGMLType.F16, 1),
    Quant("bf16", GGMLType.BF16, 32),
    Quant("f32", GGMLType.F32, 0),
    Quant("q4_k", GGMLType.Q4_K, 15),
    Quant("q6_k", GGMLType.Q6_K, 18),
)
QUANTS = {quant.name: quant for quant in _QUANTS}

HEAD = "<head>"  # stands for the matrix that makes the logits: output, or the embedding when it is used twice
SMALL = frozenset((GGMLType.Q4_0, GGMLType.Q4_1, GGMLType.Q5_0, GGMLType.Q5_1, GGMLType.Q4_K))
INTEGERS = frozenset((GGMLType.I8, GGMLType.I16, GGMLType.I32, GGMLType.I64))


@dataclass(frozen=True)
class Rule:
    """One line of the table.

    pattern : of the whole name, or HEAD;  type : None for the one that was asked for
    asked : types for which the rule holds, empty for all;  some_blocks : only in blocks that `_matters` names
    """

    pattern: str
    type: GGMLType | None
    why: str
    asked: frozenset[GGMLType] = frozenset()
    some_blocks: bool = False


_F32, _Q6_K, _Q4_K = GGMLType.F32, GGMLType.Q6_K, frozenset((GGMLType.Q4_K,))
_VALUES = r"blk\.\d+\.attn_v\.weight"
_DOWN = r"blk\.\d+\.ffn_down(_t)?\.weight"

RULES = (
    Rule(r".*_norm\.weight|.*\.bias", _F32, "norms and biases are small and act on all of the model"),
    Rule(r"rope_\w+\.weight", _F32, "factors of angles that grow with the position"),
    Rule(r"position_embd\.weight", _F32, "read one row per token, added to everything that follows"),
    Rule(r".*\.ffn_gate_inp\.weight", _F32, "a router: small, and a wrong expert cannot be made good"),
    Rule(HEAD, _Q6_K, "every error of the head is an error of the logits", SMALL),
    Rule(_VALUES, _Q6_K, "small, and attention averages values as they are", _Q4_K, some_blocks=True),
    Rule(_DOWN, _Q6_K, "its errors go into the residual stream directly", _Q4_K, some_blocks=True),
    Rule(r".*", None, "as asked"),
)

# What follows where columns are no whole number of blocks: at least as many bits, in smaller blocks.
LADDER = {_type: GGMLType.F16 for _type in BLOCK}
LADDER.update({GGMLType.Q4_K: GGMLType.Q5_0, GGMLType.Q6_K: GGMLType.Q8_0})


@dataclass(frozen=True)
class Choice:
    """The type of one tensor. fallback : the type that its columns do not allow, or None."""

    type: GGMLType
    why: str
    fallback: GGMLType | None = None


class Recipe:
    """The table applied to one model.

    names : of all its tensors;  output_type, predictor_type : instead of the table's, for the head and for
    the predictors fc1 and fc2
    """

    def __init__(
        self,
        quant: Quant,
        names: Collection[str],
        *,
        output_type: GGMLType | None = None,
        predictor_type: GGMLType | None = None,
    ) -> None:
        self.quant = quant
        self._head = "output.weight" if "output.weight" in names else "token_embd.weight"
        self._given = {HEAD: output_type}
        self._predictor_type = predictor_type
        blocks = [int(found[1]) for found in (re.match(r"blk\.(\d+)\.", name) for name in names) if found]
        self._block_count = max(blocks, default=-1) + 1

    def choose(self, name: str, shape: tuple[int, ...], stored: GGMLType) -> Choice:
        """The type of a tensor of this name, numpy shape and present type."""
        if stored in INTEGERS:
            return Choice(stored, "integers are kept")
        if len(shape) < 2:
            return Choice(GGMLType.F32, RULES[0].why)
        type_, why = self._asked(name)
        wanted = type_
        while shape[-1] % BLOCK[type_][0]:
            type_ = LADDER[type_]
        return Choice(type_, why, wanted if type_ != wanted else None)

    def _asked(self, name: str) -> tuple[GGMLType, str]:
        subject = HEAD if name == self._head else name
        if subject == HEAD and self._given[HEAD] is not None:
            return self._given[HEAD], "as asked"
        if self._predictor_type is not None and re.fullmatch(rf"blk\.\d+\.({FC1}|{FC2})\.weight", name):
            return self._predictor_type, "as asked"
        asked = self.quant.type
        for rule in RULES:
            if rule.asked and asked not in rule.asked:
                continue
            if rule.pattern != subject and not re.fullmatch(rule.pattern, subject):
                continue
            if rule.some_blocks and not self._matters(int(name.split(".")[1])):
                continue
            return (asked if rule.type is None else rule.type), rule.why
        raise AssertionError("the last rule fits every name")

    def _matters(self, block: int) -> bool:
        """The first and last eighth of the blocks and every third between, whose errors cost most."""
        eighth = self._block_count // 8
        return block < eighth or block >= 7 * self._block_count // 8 or (block - eighth) % 3 == 2
