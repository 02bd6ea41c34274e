"""Perplexity by share of skipped activations, against NumPy over transformers' and the reference's logits."""

import numpy as np
import pytest
from golden_files import dequantize, load_golden
from sparse_files import random_predictors, sparse_gguf

from pyinfer import names
from pyinfer.cpu.lowering import MOST_BY_ROWS
from pyinfer.errors import InputError
from pyinfer.neurons.profile import Profile
from pyinfer.program.reference import Reference
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.loss import measure, perplexity
from pyinfer.runtime.session import Session
from pyinfer.section import update_section

GOLDEN = load_golden("llama")


def perplexity_of(logits, windows):
    """exp of the mean negative log-probability of the tokens behind the middle of each window."""
    nll = []
    for rows, window in zip(logits, windows):
        chances = np.exp(rows - rows.max(1, keepdims=True), dtype=np.float64)
        chances /= chances.sum(1, keepdims=True)
        for place in range(len(window) // 2, len(window) - 1):
            nll.append(-np.log(chances[place, window[place + 1]]))
    return float(np.exp(np.mean(nll)))


@pytest.fixture
def path(tmp_path):
    """The tiny model with a profile of its activations on its tokens."""
    copy = tmp_path / "llama.gguf"
    copy.write_bytes(GOLDEN.path.read_bytes())
    with load_model(copy, observe="histogram") as model:
        session = Session(model, 64, 1)
        session.prefill(GOLDEN.tokens)
        layers, neurons = model.hparams.block_count, model.hparams.feed_forward_length
        bins = np.stack([session.observed("histogram", layer) for layer in range(layers)])
        session.close()
    counts = np.zeros((layers, neurons), np.int64)
    update_section(copy, profile=Profile(counts, len(GOLDEN.tokens), [], bins, "silu").to_entry())
    return copy


def test_without_thresholds_it_is_that_of_transformers(path):
    expected = perplexity_of([GOLDEN.logits], [GOLDEN.tokens])
    assert measure(path, [GOLDEN.tokens], []) == {0.0: pytest.approx(expected, rel=1e-4)}


def test_with_thresholds_it_is_that_of_the_reference(path):
    windows = [GOLDEN.tokens[:40], GOLDEN.tokens[5:30], GOLDEN.tokens[:3], GOLDEN.tokens[:4]]
    seen = []
    found = measure(path, windows, [0.5, 0.9], 2, lambda done, total: seen.append((done, total)))
    assert list(found) == [0.0, 0.5, 0.9]
    assert seen == [(done, 9) for done in range(1, 10)]  # the window of three tokens has nothing to score
    scored = [window for window in windows if len(window) > 3]
    for share in (0.5, 0.9):
        with load_model(path, sparsity=f"cats={share}") as model:
            logits = []
            for window in scored:
                n = len(window)
                reference = Reference(model.program, dequantize)
                logits.append(reference.step(window, np.arange(n), np.zeros(n, int), np.arange(n)))
        assert found[share] == pytest.approx(perplexity_of(logits, scored), rel=1e-4)
    assert len(set(found.values())) == 3


def test_predictors_are_followed(tmp_path):
    """In the half that is scored; the half before it runs as a prompt does."""
    keys = {names.POWERINFER_SPARSE_THRESHOLD: 0.25}
    path = sparse_gguf(tmp_path / "model.gguf", "relu_llama", "f32", random_predictors("relu_llama"), keys)
    window = np.random.default_rng(4).integers(3, 60, 2 * (MOST_BY_ROWS + 9))
    n, half = len(window), len(window) // 2
    found = {}
    for sparsity in ("predicted", "dense"):
        with load_model(path, sparsity=sparsity) as model:
            session = Session(model, 64, 2)
            found[sparsity] = perplexity(session, [window])
            session.close()
            reference = Reference(model.program, dequantize)
            parts = []
            for part, guesses in ((range(half), False), (range(half, n), True)):
                reference.guesses = guesses
                rows = len(part)
                parts.append(
                    reference.step(window[part], np.array(part), np.zeros(rows, int), np.arange(rows))
                )
        expected = perplexity_of([np.concatenate(parts)], [window])
        assert found[sparsity] == pytest.approx(expected, rel=1e-3)
    assert abs(found["predicted"] / found["dense"] - 1) > 0.02


def test_no_text_to_score_is_one_sentence(path):
    with pytest.raises(InputError, match="no window of the text has 4 tokens"):
        measure(path, [GOLDEN.tokens[:3]], [0.5])


def test_a_model_without_a_profile_is_one_sentence():
    with pytest.raises(InputError, match="needs a profile"):
        measure(GOLDEN.path, [GOLDEN.tokens], [0.5])
