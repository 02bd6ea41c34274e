"""The table of types: what each kind of tensor gets, and what happens where blocks do not fit."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from pyinfer.names import BLOCK, GGMLType
from pyinfer_convert.recipe import HEAD, LADDER, QUANTS, RULES, SMALL, Recipe

NAMES = ["token_embd.weight", "output_norm.weight", "output.weight", "position_embd.weight"]
PARTS = ("attn_norm", "attn_q", "attn_v", "ffn_gate_inp", "ffn_down", "ffn_up", "fc1", "fc2")
BLOCKS = 24
NAMES += [f"blk.{block}.{part}.weight" for block in range(BLOCKS) for part in PARTS]
every_quant = pytest.mark.parametrize("quant", QUANTS.values(), ids=QUANTS)


def chosen(quant, name, shape=(512, 512), names=NAMES, stored=GGMLType.F16, **given):
    return Recipe(quant, names, **given).choose(name, shape, stored)


@every_quant
def test_matrices_get_what_was_asked(quant):
    for name in ("token_embd.weight", "blk.3.attn_q.weight", "blk.3.ffn_up.weight", "blk.0.fc1.weight"):
        found = chosen(quant, name)
        assert (found.type, found.fallback) == (quant.type, None)


@every_quant
def test_norms_biases_positions_and_routers_stay_exact(quant):
    for name in (
        "output_norm.weight",
        "blk.1.attn_norm.weight",
        "position_embd.weight",
        "blk.1.ffn_gate_inp.weight",
    ):
        assert chosen(quant, name).type == GGMLType.F32
    assert chosen(quant, "blk.1.attn_q.bias", (512,)).type == GGMLType.F32


@every_quant
def test_the_head_gets_six_bits_beside_fewer(quant):
    expected = GGMLType.Q6_K if quant.type in SMALL else quant.type
    assert chosen(quant, "output.weight").type == expected
    tied = [name for name in NAMES if name != "output.weight"]
    assert chosen(quant, "token_embd.weight", names=tied).type == expected
    assert chosen(quant, "output.weight", output_type=GGMLType.BF16).type == GGMLType.BF16
    assert chosen(quant, "token_embd.weight", output_type=GGMLType.BF16).type == quant.type


def test_q4_k_gives_more_bits_where_errors_cost_most():
    """The first and last eighth of the blocks and every third between, as llama.cpp's Q4_K_M."""
    for part in ("attn_v", "ffn_down", "ffn_down_t"):
        found = [
            block
            for block in range(BLOCKS)
            if chosen(QUANTS["q4_k"], f"blk.{block}.{part}.weight").type != GGMLType.Q4_K
        ]
        assert found == [0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23]
    assert chosen(QUANTS["q4_k"], "blk.0.attn_k.weight").type == GGMLType.Q4_K
    assert chosen(QUANTS["q6_k"], "blk.0.ffn_down.weight").type == GGMLType.Q6_K


@pytest.mark.parametrize(
    "quant, columns, expected",
    [
        ("q4_k", 288, GGMLType.Q5_0),
        ("q4_k", 40, GGMLType.F16),
        ("q6_k", 288, GGMLType.Q8_0),
        ("q6_k", 33, GGMLType.F16),
        ("q4_0", 48, GGMLType.F16),
        ("q8_0", 1, GGMLType.F16),
    ],
)
def test_columns_that_fill_no_blocks_go_down_the_ladder(quant, columns, expected):
    found = chosen(QUANTS[quant], "blk.3.ffn_up.weight", (512, columns))
    assert (found.type, found.fallback) == (expected, QUANTS[quant].type)


@pytest.mark.parametrize("quant", ["f16", "bf16", "f32"])
def test_floats_take_any_columns(quant):
    found = chosen(QUANTS[quant], "blk.3.ffn_up.weight", (512, 7))
    assert (found.type, found.fallback) == (QUANTS[quant].type, None)


def test_the_ladder_ends_and_never_loses_bits():
    for first in LADDER:
        type_ = first
        for _ in range(3):
            following = LADDER[type_]
            if BLOCK[type_][0] > 1:
                bits = [BLOCK[each][1] / BLOCK[each][0] for each in (type_, following)]
                assert bits[0] < bits[1]
            type_ = following
        assert type_ == GGMLType.F16


def test_predictors_and_integers():
    quant = QUANTS["q4_0"]
    assert chosen(quant, "blk.7.fc2.weight", predictor_type=GGMLType.Q8_0).type == GGMLType.Q8_0
    assert chosen(quant, "blk.7.ffn_up.weight", predictor_type=GGMLType.Q8_0).type == GGMLType.Q4_0
    assert chosen(quant, "index", stored=GGMLType.I32).type == GGMLType.I32


def test_every_rule_says_why_and_decides_for_some_tensor():
    subjects = [HEAD, "rope_freqs.weight", "blk.1.ffn_down.weight", *NAMES, "blk.0.attn_q.bias"]
    for rule in RULES:
        assert rule.why
        first = [
            next(each for each in RULES if each.pattern == name or re.fullmatch(each.pattern, name))
            for name in subjects
        ]
        assert rule in first


def test_the_document_shows_the_table():
    text = (Path(__file__).parents[2] / "docs" / "convert.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("|")]
    for rule in RULES:
        type_ = "as asked" if rule.type is None else rule.type.name
        assert any(f"| {type_} | {rule.why} |" in row for row in rows)
    for wanted, got in LADDER.items():
        if wanted in (GGMLType.Q4_K, GGMLType.Q6_K):
            assert f"{wanted.name} to {got.name}" in text
    for quant in QUANTS:
        assert quant == "f32" or any(row.startswith(f"| {quant} |") for row in rows)
