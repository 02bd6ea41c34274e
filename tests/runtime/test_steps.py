"""What a row computes depends only on its own past: not on the rows beside it, on chunks, or on threads.

All comparisons are bit for bit: an answer does not change with the way in which its tokens were grouped.
"""

from __future__ import annotations

import numpy as np
import pytest
from golden_files import NAMES, load_golden

from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer_tools.random_model import SHAPES, write_random_model

QUANTS = ("q4_0", "q4_1", "q8_0", "f16")
every_model = pytest.mark.parametrize("name", [*NAMES, *QUANTS])


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """opened(name) -> (Model, tokens), each loaded once; a quantization is a random llama of that type."""
    made = {}

    def load(name: str):
        if name not in made:
            if name in QUANTS:
                path = tmp_path_factory.mktemp("random") / f"{name}.gguf"
                write_random_model(path, SHAPES["tiny"], name)
                made[name] = load_model(path), np.random.default_rng(2).integers(3, 500, 40)
            else:
                golden = load_golden(name)
                made[name] = load_model(golden.path), golden.tokens
        return made[name]

    yield load
    for model, _ in made.values():
        model.close()


def evaluate(model, parts, n_threads: int = 2, sequence: int = 0, **sizes) -> np.ndarray:
    """Logits of all tokens, given to a new session in parts."""
    session = Session(model, 64, n_threads, **sizes)
    made = [session.prefill(part, sequence, all_logits=True) for part in parts]
    session.close()
    return np.concatenate(made)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.isfinite(expected).all() and expected.std() > 0
    np.testing.assert_array_equal(found, expected)


@every_model
def test_prefill_equals_single_steps(name, opened):
    model, tokens = opened(name)
    single = evaluate(model, tokens[:, None])
    for sizes in ([len(tokens)], [1, 3, 4, 5, 8, 19], [17, 2, 21]):
        same(evaluate(model, np.split(tokens, np.cumsum(sizes)[:-1])), single)


@every_model
def test_chunks_equal_one_piece(name, opened, monkeypatch):
    model, tokens = opened(name)
    whole = evaluate(model, [tokens])
    monkeypatch.setattr("pyinfer.runtime.session.CHUNK_ROWS", 16)
    same(evaluate(model, [tokens]), whole)


@every_model
def test_threads_do_not_change_a_bit(name, opened):
    model, tokens = opened(name)
    parts = [tokens[:20], tokens[20:21], tokens[21:24], tokens[24:]]
    expected = evaluate(model, parts, 1)
    for n_threads in (2, 3):
        same(evaluate(model, parts, n_threads), expected)


@every_model
def test_a_batch_equals_single_sequences(name, opened):
    """Several sequences at once, of other lengths, in changing order."""
    model, tokens = opened(name)
    random = np.random.default_rng(1)
    prompts = [tokens[:1], tokens[1:10], tokens[10:13], tokens[13:31], tokens[31:36]]
    alone = []
    for prompt in prompts:
        session = Session(model, 64, 2)
        steps = [session.prefill(prompt), *(session.step([token], [0])[0] for token in tokens[:6])]
        alone.append(np.stack(steps))
        session.close()
    together = Session(model, 64, 2, n_sequences=len(prompts))
    for sequence, prompt in enumerate(prompts):
        same(together.prefill(prompt, sequence), alone[sequence][0])
    for number in range(6):
        order = random.permutation(len(prompts))
        found = together.step([tokens[number]] * len(order), order.tolist())
        same(found, np.stack([alone[sequence][number + 1] for sequence in order]))
    together.close()


@every_model
def test_only_the_last_logits(name, opened):
    """What is not asked for is not computed, and what is asked for is the same."""
    model, tokens = opened(name)
    session = Session(model, 64, 2)
    last = session.prefill(tokens)
    session.close()
    assert last.shape == (session.n_vocab,) and last.dtype == np.float32
    same(last, evaluate(model, [tokens])[-1])
