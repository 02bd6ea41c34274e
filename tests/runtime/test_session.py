"""Sessions at their edges: full, empty, wrong, cut back, interrupted, used wrongly."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from golden_files import load_golden, reference_logits

from pyinfer.errors import CapacityError, ContextFullError, InputError
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session

TOKENS = load_golden("llama").tokens
N_VOCAB = 288


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def model(request):
    with load_model(load_golden(request.param).path) as made:
        yield made


@pytest.fixture
def session(model):
    made = Session(model, 48, 2, n_sequences=3)
    yield made
    made.close()


def fresh(model, tokens) -> np.ndarray:
    """Logits behind these tokens in a session of their own."""
    made = Session(model, 64, 2)
    logits = made.prefill(tokens)
    made.close()
    return logits


def test_a_full_context_takes_exactly_its_tokens(model, session):
    tokens = np.resize(TOKENS, 48)
    np.testing.assert_array_equal(session.prefill(tokens), fresh(model, tokens))
    assert session.length() == session.n_ctx == 48
    for evaluate in (
        lambda: session.prefill([1]),
        lambda: session.step([1], [0]),
        lambda: session.step([1, 1], [1, 0]),
    ):
        with pytest.raises(ContextFullError, match="48"):
            evaluate()
    assert [session.length(sequence) for sequence in range(3)] == [48, 0, 0]


def test_what_does_not_fit_changes_nothing(model, session):
    session.prefill(TOKENS[:10])
    with pytest.raises(ContextFullError, match=r"49 .*48"):
        session.prefill(TOKENS[:39])
    assert session.length() == 10
    np.testing.assert_array_equal(session.prefill(TOKENS[10:12]), fresh(model, TOKENS[:12]))


@pytest.mark.parametrize("tokens", [[], (), np.array([], np.int32)])
def test_no_tokens(session, tokens):
    with pytest.raises(InputError, match="at least one"):
        session.prefill(tokens)
    with pytest.raises(InputError):
        session.step([], [])


@pytest.mark.parametrize("bad", [-1, -(2**40), N_VOCAB, 2**31, 2**40])
def test_ids_outside_of_the_vocabulary(model, session, bad):
    session.prefill(TOKENS[:3])
    for evaluate in (
        lambda: session.prefill([1, bad, 2]),
        lambda: session.step([bad], [0]),
        lambda: session.step([1, bad], [0, 1]),
    ):
        with pytest.raises(InputError, match=str(bad)):
            evaluate()
    assert session.length() == 3
    np.testing.assert_array_equal(session.prefill(TOKENS[3:5]), fresh(model, TOKENS[:5]))


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_ctx": 0},
        {"n_ctx": -5},
        {"n_threads": 0},
        {"n_threads": -1},
        {"n_threads": 100_000},
        {"n_sequences": 0},
    ],
    ids=str,
)
def test_sizes_out_of_range(model, sizes):
    with pytest.raises(InputError, match=next(iter(sizes))):
        Session(model, **{"n_ctx": 8, **sizes})


@pytest.mark.parametrize("n_ctx", [2**40, 2**62])
def test_a_context_that_no_memory_holds(model, n_ctx):
    with pytest.raises(CapacityError):
        Session(model, n_ctx, 1)


def test_truncated_sessions_go_on_as_new_ones(model, session):
    session.prefill(TOKENS)
    for length in (30, 17, 16, 1, 0):
        session.truncate(length)
        assert session.length() == length
        other = TOKENS[::-1][: 40 - length]
        expected = fresh(model, np.concatenate([TOKENS[:length], other]))
        np.testing.assert_array_equal(session.prefill(other), expected)
        session.truncate(length)


def test_truncate_forgets_at_most_what_is_there(session):
    session.prefill(TOKENS[:5])
    session.truncate(100)
    assert session.length() == 5
    session.truncate(-3)
    assert session.length() == 0


def test_sequences_do_not_see_each_other(model, session):
    session.prefill(TOKENS[:20], 0)
    session.prefill(TOKENS[20:30], 2)
    session.truncate(0, 0)
    np.testing.assert_array_equal(session.prefill(TOKENS[30:35], 2), fresh(model, TOKENS[20:35]))
    assert [session.length(sequence) for sequence in range(3)] == [0, 0, 15]


def test_logits_belong_to_the_caller(session):
    first = session.prefill(TOKENS[:4], all_logits=True)
    kept = first.copy()
    first_step = session.step([TOKENS[4]], [0])
    step_kept = first_step.copy()
    session.step([TOKENS[5]], [0])
    session.prefill(TOKENS[6:10], all_logits=True)[:] = 7
    np.testing.assert_array_equal(first, kept)
    np.testing.assert_array_equal(first_step, step_kept)


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr("pyinfer.runtime.session.CHUNK_ROWS", 8)


@pytest.mark.parametrize("allowed", [0, 1, 3])
def test_cancelled_between_chunks(small_chunks, model, allowed):
    session, asked = Session(model, 48, 2), []

    def cancelled() -> bool:
        asked.append(session.length())
        return len(asked) > allowed

    assert session.prefill(TOKENS, cancelled=cancelled) is None
    assert session.length() == 8 * allowed
    assert asked == [8 * k for k in range(allowed + 1)]
    np.testing.assert_array_equal(session.prefill(TOKENS[8 * allowed :]), fresh(model, TOKENS))
    session.close()


def test_logits_are_those_of_the_reference(small_chunks, model):
    """F32 all the way, the cache too: parts of less and more than one chunk, a batch, prefixes kept."""

    def near(found, sequence):
        tokens = np.array(histories[sequence])
        expected = reference_logits(model.file.path, tokens)[-1]
        assert np.abs(found - expected).max() <= 2e-5 * np.abs(expected).max()

    def append(part, sequence):
        histories[sequence] += part.tolist()
        near(session.prefill(part, sequence), sequence)

    session, histories = Session(model, 48, 2, n_sequences=3), [[], [], []]
    for sequence, n in enumerate((5, 20, 37)):  # chunks are of 8
        append(TOKENS[:n], sequence)
    for _ in range(3):
        order = [2, 0, 1]
        for sequence in order:
            histories[sequence].append(int(TOKENS[len(histories[sequence]) % 30]))
        found = session.step([histories[sequence][-1] for sequence in order], order)
        for row, sequence in zip(found, order):
            near(row, sequence)
    for sequence, length, n in ((2, 17, 3), (2, 16, 20), (1, 1, 9)):
        session.truncate(length, sequence)
        histories[sequence] = histories[sequence][:length]
        append(TOKENS[::-1][:n], sequence)
    session.close()


def test_progress_ends_with_the_total(small_chunks, model):
    session, seen = Session(model, 48, 2), []
    session.prefill(TOKENS[:3])
    session.prefill(TOKENS[3:], progress=lambda done, total: seen.append((done, total)))
    assert seen == [(8, 37), (16, 37), (24, 37), (32, 37), (37, 37)]
    session.close()


def test_an_error_of_the_caller_leaves_a_session_that_knows_what_it_holds(small_chunks, model):
    session = Session(model, 48, 2)

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        session.prefill(TOKENS, progress=interrupt)
    assert session.length() == 8
    np.testing.assert_array_equal(session.prefill(TOKENS[8:]), fresh(model, TOKENS))
    session.close()


def test_weights_that_are_no_numbers_end_in_logits_that_are_none(tmp_path):
    """Never a crash or a hang; the sampler says what is wrong."""
    spoiled = tmp_path / "nan.gguf"
    data = bytearray(load_golden("llama").path.read_bytes())
    with load_model(load_golden("llama").path) as made:
        norm = made.file.tensors["blk.0.attn_norm.weight"].data.tobytes()
    at = data.find(norm)
    data[at : at + 4] = np.float32("nan").tobytes()
    spoiled.write_bytes(data)
    with load_model(spoiled) as made:
        session = Session(made, 48, 2)
        for logits in (session.prefill(TOKENS), session.step([1], [0])[0]):
            assert np.isnan(logits).all()
        session.close()


WRONG_SEQUENCES = """
import sys
from pyinfer.errors import InputError
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session

session = Session(load_model(sys.argv[1]), 48, 1, n_sequences=3)
session.prefill([1, 2, 3], 1)
calls = {
    "prefill -1": lambda: session.prefill([1], -1),
    "prefill 3": lambda: session.prefill([1], 3),
    "step -1": lambda: session.step([1], [-1]),
    "step 3": lambda: session.step([1], [3]),
    "step twice": lambda: session.step([1, 2], [1, 1]),
    "step more tokens": lambda: session.step([1, 2], [0]),
    "step more sequences": lambda: session.step([1], [0, 1]),
}
for name, call in calls.items():
    try:
        call()
        print(name, "was taken")
    except InputError:
        pass
    except Exception as error:
        print(name, "raised", repr(error))
"""


def test_sequences_that_there_are_not():
    """They are addresses in the end: in a process of its own, which a wrong one would bring down."""
    command = [sys.executable, "-c", WRONG_SEQUENCES, str(load_golden("llama").path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
