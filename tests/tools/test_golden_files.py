"""The committed golden files are whole and as their scripts describe them."""

from __future__ import annotations

import json
import math

import gguf
import numpy as np
import pytest
from golden_files import FOLDER

from pyinfer_tools.golden import _MAX_BYTES, _TOKENS, GOLDEN
from pyinfer_tools.golden_greedy import PROMPTS


def test_every_model_has_its_files_and_no_other():
    expected = {f"{golden.name}.{kind}" for golden in GOLDEN for kind in ("gguf", "npz")}
    assert {path.name for path in FOLDER.iterdir() if path.suffix in (".gguf", ".npz")} == expected


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_model_and_logits_belong_together(golden):
    path = FOLDER / f"{golden.name}.gguf"
    reader = gguf.GGUFReader(path)
    assert path.stat().st_size <= _MAX_BYTES
    assert reader.fields["general.architecture"].contents() == golden.architecture
    shapes = {tensor.name: tensor.shape.tolist() for tensor in reader.tensors}
    assert ("output.weight" not in shapes) == golden.config["tie_word_embeddings"]
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == shapes["token_embd.weight"][1]
    stored = np.load(FOLDER / f"{golden.name}.npz")
    assert stored["logits"].shape == (_TOKENS, golden.config["vocab_size"])
    assert stored["logits"].dtype == np.float32 and np.isfinite(stored["logits"]).all()
    assert stored["tokens"].shape == (_TOKENS,)
    assert stored["tokens"].min() >= 0 and stored["tokens"].max() < golden.config["vocab_size"]


def test_perplexity_is_whole():
    made = json.loads((FOLDER / "smollm2_perplexity.json").read_text(encoding="utf-8"))
    chunks, scored = len(made["nll_of_chunks"]), made["ctx"] - 1 - made["ctx"] // 2
    assert chunks >= 3 and len(made["tokens"]) == chunks * made["ctx"]
    assert all(0 <= token < 49_152 for token in made["tokens"])
    assert math.exp(sum(made["nll_of_chunks"]) / (chunks * scored)) == pytest.approx(
        made["perplexity"], rel=1e-5
    )


@pytest.mark.parametrize("name", ["smollm2_greedy", "smollm2_greedy_exact"])
def test_greedy_cases_are_whole(name):
    made = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    assert made["exact"] == name.endswith("exact")
    assert [case["prompt"] for case in made["cases"]] == PROMPTS
    for case in made["cases"]:
        assert len(case["ids"]) == len(case["gaps"]) == 64
        assert min(case["gaps"]) >= 0
        assert all(0 <= token < 49_152 for token in case["tokens"] + case["ids"])
