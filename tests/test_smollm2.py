"""The default model against llama.cpp: what it would say after every token of twenty stored answers.

tests/golden/smollm2_greedy_exact.json holds greedy answers of llama.cpp without any rounding of activations
or cache, that is, the truth for these weights, and the gap between the two best logits at each step. With
8-bit activations logits move by 0.23 (root mean square), in llama.cpp as here, so that some near-ties fall
the other way: of 1,280 choices 34 and 40 in llama.cpp's single and batched steps, 33 here.
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from golden_files import FOLDER, dequantize

from pyinfer.gguf_file import open_gguf
from pyinfer.models import build_program
from pyinfer.names import GGMLType
from pyinfer.program.reference import Reference
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer_convert.requantize import requantize
from pyinfer_tools.perplexity import measure, read_text

pytestmark = pytest.mark.model

NEAR_TIE = 0.05
CASES = json.loads((FOLDER / "smollm2_greedy_exact.json").read_text(encoding="utf-8"))["cases"]
STEPS = 24
CHOICES = sum(len(case["ids"]) for case in CASES)


@pytest.fixture(scope="module")
def model(smollm2_path):
    with load_model(smollm2_path) as made:
        yield made


@pytest.fixture(scope="module")
def exact(smollm2_path):
    """Logits float32 [64, V] per case by the reference executor, in float64 all the way."""
    made = []
    with open_gguf(smollm2_path) as file:
        reference = Reference(build_program(file)[1], dequantize)
        for sequence, case in enumerate(CASES):
            tokens = forced(case)
            n, first = len(tokens), len(case["tokens"]) - 1
            logits = reference.step(tokens, np.arange(n), np.full(n, sequence), np.arange(first, n))
            made.append(logits.astype(np.float32))
    return made


def forced(case) -> list[int]:
    """The prompt and the answer but its last token."""
    return case["tokens"] + case["ids"][:-1]


def answers(model) -> list[np.ndarray]:
    """Logits float32 [64, V] per case by the cpu executor, in one prefill each."""
    session, made = Session(model, 512, 2), []
    for case in CASES:
        session.truncate(0)
        made.append(session.prefill(forced(case), all_logits=True)[len(case["tokens"]) - 1 :])
    session.close()
    return made


def other_choices(logits: list[np.ndarray]) -> list[float]:
    """The stored gaps where the best token is another than the stored one."""
    return [
        gap
        for case, rows in zip(CASES, logits)
        for token, gap, best in zip(case["ids"], case["gaps"], rows.argmax(1))
        if best != token
    ]


def test_the_reference_chooses_as_llama_cpp(exact):
    assert max(other_choices(exact), default=0.0) < NEAR_TIE


def test_unrounded_weights_choose_as_llama_cpp(smollm2_path, exact, tmp_path):
    """The same weights in float32, whose kernels round neither activations nor what the cache holds."""
    path = tmp_path / "f32.gguf"
    requantize(smollm2_path, path, GGMLType.F32)
    with load_model(path) as made:
        logits = answers(made)
    path.unlink()
    assert max(other_choices(logits), default=0.0) < NEAR_TIE
    error = np.concatenate(logits) - np.concatenate(exact)
    assert np.sqrt((error**2).mean()) < 0.01


def test_rounded_activations_cost_what_they_cost_llama_cpp(model, exact):
    logits = answers(model)
    gaps = other_choices(logits)
    assert len(gaps) <= 0.0375 * CHOICES and max(gaps) < 0.6
    error = np.concatenate(logits) - np.concatenate(exact)
    assert np.sqrt((error**2).mean()) < 0.26


def test_perplexity_is_that_of_llama_cpp(model):
    """Of 441 tokens; each engine's rounding of activations moves a chunk's sum by about half a percent."""
    golden = json.loads((FOLDER / "smollm2_perplexity.json").read_text(encoding="utf-8"))
    tokens = model.tokenizer.encode(read_text(FOLDER / "perplexity.txt"))
    assert tokens[: len(golden["tokens"])] == golden["tokens"]
    session, sums = Session(model, golden["ctx"], 2), [0.0]
    score = measure(session, golden["tokens"], None, golden["bos"], lambda *state: sums.append(state[2].nll))
    session.close()
    np.testing.assert_allclose(np.diff(sums), golden["nll_of_chunks"], rtol=0.015)
    assert score.perplexity == pytest.approx(golden["perplexity"], rel=0.003)


def test_answers_step_by_step(model):
    """All cases as a batch that chooses for itself, up to the first choice that rounding may change."""
    session = Session(model, 160, 2, n_sequences=len(CASES))
    chosen = [[int(session.prefill(case["tokens"], at).argmax())] for at, case in enumerate(CASES)]
    for _ in range(STEPS - 1):
        rows = session.step([answer[-1] for answer in chosen], list(range(len(CASES))))
        for answer, row in zip(chosen, rows):
            answer.append(int(row.argmax()))
    session.close()
    compared = 0
    for case, answer in zip(CASES, chosen):
        sure = next((at for at, gap in enumerate(case["gaps"][:STEPS]) if gap < 0.4), STEPS)
        assert answer[:sure] == case["ids"][:sure], case["prompt"]
        compared += sure
    assert compared >= 70


def test_the_same_alone_and_in_single_steps(model):
    """Bit for bit, at the model's real size."""
    case = CASES[0]
    tokens = forced(case)
    session = Session(model, 160, 2, n_sequences=2)
    whole = session.prefill(tokens, all_logits=True)
    session.prefill(tokens[:10], 1)
    single = [session.step([token], [1])[0] for token in tokens[10:30]]
    session.close()
    np.testing.assert_array_equal(single, whole[10:30])
