"""pyinfer-perplexity and pyinfer-bench with --sparsity: what is asked for is what runs."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
from click.testing import CliRunner
from golden_files import dequantize
from hf_checkpoints import FOLDER
from sparse_files import random_predictors, sparse_gguf

from pyinfer import jit, names
from pyinfer.cpu.lowering import MOST_BY_ROWS
from pyinfer.program.reference import Reference
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer_convert.cli import main as convert
from pyinfer_tools import bench, perplexity
from pyinfer_tools.scoring import scored_blocks

N_CTX, CHUNKS = 88, 2  # 44 tokens before, 43 scored
TOKENS = np.random.default_rng(3).integers(3, 60, 2 * N_CTX).tolist()


@pytest.fixture(scope="module")
def predicting(tmp_path_factory):
    """A ReLU model with predictors that miss much, so that its figures differ from the dense ones."""
    path = tmp_path_factory.mktemp("predicting") / "model.gguf"
    keys = {names.POWERINFER_SPARSE_THRESHOLD: 0.25}
    return sparse_gguf(path, "relu_llama", "f32", random_predictors("relu_llama"), keys)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A SiLU model with a tokenizer and a profile, and a text."""
    folder = tmp_path_factory.mktemp("told")
    text = folder / "words.txt"
    draw = random.Random(1)
    words = ("cat", "dog", "sat", "ran", "the", "a")
    text.write_text("".join(f"{draw.choice(words)}\n" for _ in range(300)), encoding="utf-8")
    path = folder / "model.gguf"
    for arguments in (
        [str(FOLDER / "llama"), "-o", str(path), "--quant", "f32", "--by-neuron"],
        ["profile", str(path), "--text", str(text), "--no-loss"],
    ):
        done = CliRunner().invoke(convert, arguments)
        assert done.exit_code == 0, done.stderr
    return path, text


def measured(path, sparsity: str) -> tuple[float, int]:
    """Perplexity, and how many tokens ran in steps of few rows."""
    with load_model(path, sparsity=sparsity) as model:
        session = Session(model, N_CTX, 2)
        try:
            score = perplexity.measure(session, TOKENS, CHUNKS, None, None, perplexity._most_rows(model))
            return score.perplexity, session.few_tokens
        finally:
            session.close()


def expected(path, sparsity: str) -> float:
    """By the reference executor in float64, which guesses in the second halves only."""
    nll = []
    with load_model(path, sparsity=sparsity) as model:
        for start in range(0, CHUNKS * N_CTX, N_CTX):
            chunk, half = np.array(TOKENS[start : start + N_CTX]), N_CTX // 2
            reference = Reference(model.program, dequantize)
            for guesses, rows in ((False, np.arange(half)), (True, np.arange(half, N_CTX - 1))):
                reference.guesses = guesses
                wanted = range(len(rows))
                logits = reference.step(chunk[rows], rows, np.zeros(len(rows), int), wanted)
            logits = logits - logits.max(1, keepdims=True)
            chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
            nll += [-np.log(row[chunk[half + 1 + n]]) for n, row in enumerate(chances)]
    return float(np.exp(np.mean(nll)))


@pytest.mark.parametrize("sparsity", ["predicted", "auto"])
def test_a_model_with_predictors_is_scored_with_them(predicting, sparsity):
    found, few = measured(predicting, sparsity)
    assert few == CHUNKS * (N_CTX // 2 - 1)  # all that is scored, nothing of what stands before
    assert found == pytest.approx(expected(predicting, "predicted"), rel=1e-4)
    assert abs(found / measured(predicting, "exact")[0] - 1) > 1e-3  # they do miss


def test_without_predictors_steps_are_long(predicting):
    exact, few = measured(predicting, "exact")
    assert few == 0
    assert exact == pytest.approx(measured(predicting, "dense")[0], rel=1e-5)


@pytest.mark.parametrize("most_rows", [1, MOST_BY_ROWS])
def test_short_blocks_cover_the_same_positions(most_rows):
    blocks = list(scored_blocks(N_CTX, 100, most_rows))
    assert [each for start, stop in blocks for each in range(start, stop)] == list(range(44, 87))
    assert max(stop - start for start, stop in blocks) == most_rows


def run(command, *arguments, code: int = 0):
    done = CliRunner().invoke(command, [str(each) for each in arguments])
    assert done.exit_code == code and "Traceback" not in done.stderr, done.stderr
    return done


def test_the_command_scores_what_is_asked_for(told):
    path, text = told
    found = {}
    for sparsity in ("dense", "cats=0.3", "cats=0.6"):
        arguments = ("-m", path, "-f", text, "--ctx", 64, "--chunks", 3, "--json", "--sparsity", sparsity)
        found[sparsity] = json.loads(run(perplexity.main, *arguments).stdout)["perplexity"]
    assert len(set(found.values())) == 3
    with load_model(path, sparsity="cats=0.6") as model:
        session = Session(model, 64, 1)
        tokens = model.tokenizer.encode(perplexity.read_text(text))
        bos = model.tokenizer.bos_id if model.tokenizer.add_bos else None
        score = perplexity.measure(session, tokens, 3, bos)
        session.close()
    assert found["cats=0.6"] == pytest.approx(score.perplexity, rel=1e-6)


def test_modes_that_cannot_be_are_one_sentence(told, predicting):
    path, text = told
    for sparsity, words in (("exact", "leaves no neuron at zero"), ("most", "expected one of auto")):
        said = run(perplexity.main, "-m", path, "-f", text, "--sparsity", sparsity, code=1).stderr
        assert said.startswith("Error: ") and words in said and said.count("\n") == 1
        said = run(bench.main, "-m", path, "--sparsity", sparsity, code=1).stderr
        assert said.startswith("Error: ") and words in said and said.count("\n") == 1


def test_the_bench_runs_what_is_asked_for(told, monkeypatch):
    monkeypatch.setattr(jit, "read_bandwidth", lambda threads: 1e10)
    arguments = ("-m", told[0], "-p", 0, "-n", 3, "-r", 1, "--threads", 1)
    skipping = json.loads(run(bench.main, *arguments, "--sparsity", "cats=0.5", "--json").stdout)
    assert skipping["sparsity"] == "cats=0.5" and skipping["decode_tokens_per_second"] > 0
    assert "achieved_bytes_per_second" not in skipping  # not known: neurons are skipped
    whole = json.loads(run(bench.main, *arguments, "--json").stdout)
    assert whole["sparsity"] == "auto" and whole["achieved_bytes_per_second"] > 0
    assert ", sparsity cats=0.5" in run(bench.main, *arguments, "--sparsity", "cats=0.5").stdout


def test_a_section_that_cannot_be_used_is_mentioned(told, tmp_path, monkeypatch):
    monkeypatch.setattr(jit, "read_bandwidth", lambda threads: 1e10)
    data = bytearray(told[0].read_bytes())
    data[-100] ^= 1
    path = tmp_path / "damaged.gguf"
    path.write_bytes(data)
    said = run(perplexity.main, "-m", path, "-f", told[1], "--ctx", 64, "--chunks", 1).stderr
    assert "note: damaged.gguf: its placement section" in said
    assert "note: damaged.gguf" in run(bench.main, "-m", path, "-p", 0, "-n", 1, "-r", 1).stderr
