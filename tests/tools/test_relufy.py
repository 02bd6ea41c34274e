"""relufy's training: the model against transformers, gradients, counting, resuming, the export."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hf_checkpoints import FOLDER, converted, golden_logits, write_gguf

torch = pytest.importorskip("torch", reason="the extra [train]; test_relufy_files.py needs none")

from pyinfer.runtime.loader import load_model  # noqa: E402
from pyinfer.runtime.session import Session  # noqa: E402
from pyinfer_convert.checkpoint import open_checkpoint  # noqa: E402
from pyinfer_tools import relufy, relufy_run  # noqa: E402
from pyinfer_tools.relufy_corpus import Corpus, draw, fill_from_text, sample_corpus, sample_rows  # noqa: E402
from pyinfer_tools.relufy_files import GATE, read_teacher  # noqa: E402
from pyinfer_tools.relufy_model import JumpGate, Llama, load_weights, save_weights  # noqa: E402
from pyinfer_tools.relufy_run import read_student  # noqa: E402
from pyinfer_tools.relufy_score import measure  # noqa: E402
from pyinfer_tools.relufy_train import HeadDivergence, Plan, Trainer  # noqa: E402

ROWS = 8
pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of its compiler


@pytest.fixture(scope="module")
def teacher():
    """The golden llama, with rows of 32 tokens so that tests are short."""
    found = read_teacher(FOLDER / "llama")
    return dataclasses.replace(found, shape=dataclasses.replace(found.shape, context=32))


@pytest.fixture
def model(teacher):
    made = Llama(teacher.shape, sparse=False)
    load_weights(made, teacher.tensors)
    return made.requires_grad_(False)


@pytest.fixture
def student(teacher):
    made = Llama(teacher.shape, sparse=True)
    load_weights(made, teacher.tensors)
    return made


@pytest.fixture
def corpus(tmp_path, model):
    made = Corpus(tmp_path / "corpus", ROWS, 32, 64)
    sample_corpus(made, model, 1, 2, lambda done, total: None)
    return made


def _trainer(student, model, corpus, **changes) -> Trainer:
    plan = Plan(**{"tokens": 4000, "minutes": 0, "sparsity": 0.8, "rows": 4, **changes})
    made = Trainer(student, model.head_matrix.detach(), plan, corpus)
    made.prepare()
    return made


def test_the_teacher_computes_what_transformers_does(teacher):
    tokens, wanted = golden_logits("llama")
    whole = Llama(dataclasses.replace(teacher.shape, context=len(tokens)), sparse=False)
    load_weights(whole, teacher.tensors)
    with torch.no_grad():
        state, _ = whole(torch.from_numpy(tokens).long()[None])
        found = (state[0] @ whole.head_matrix.T).numpy()
    assert np.abs(found - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_training_and_inference_attention_agree(model):
    tokens = torch.randint(0, 272, (3, 32), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted, _ = model(tokens)
    found, _ = model(tokens)  # with gradients: by matrix products
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_sampled_states_are_those_of_the_whole_row(model):
    tokens, states = sample_rows(model, 5, 7)
    with torch.no_grad():
        wanted, _ = model(tokens)
    assert (tokens[:, 0] == 269).all()
    torch.testing.assert_close(states.float(), wanted, rtol=1e-2, atol=1e-2)  # kept as bfloat16


@pytest.mark.parametrize("vocabulary", [100, 128, 300])
def test_tokens_are_drawn_by_their_probability(vocabulary):
    """Every uniform number on a fine grid: each token is drawn as often as its probability says."""
    random = np.random.default_rng(vocabulary)
    logits = random.standard_normal(vocabulary) * 3
    wanted = np.exp(logits) / np.exp(logits).sum()
    steps = 20_000
    uniform = (torch.arange(steps, dtype=torch.float64) + 0.5) / steps
    rows = torch.from_numpy(logits).float().repeat(steps, 1)
    found = np.bincount(draw(rows, uniform).numpy(), minlength=vocabulary) / steps
    assert np.abs(found - wanted).max() < 2 / steps


def test_a_corpus_that_was_stopped_equals_an_unbroken_one(tmp_path, model, monkeypatch):
    monkeypatch.setattr("pyinfer_tools.relufy_corpus.BATCH_ROWS", 2)
    whole = Corpus(tmp_path / "whole", ROWS, 32, 64)
    sample_corpus(whole, model, 5, 2, lambda done, total: None)

    class Killed(Exception):
        pass

    def kill(done: int, total: int) -> None:
        if done >= total // 2:
            raise Killed

    with pytest.raises(Killed):
        sample_corpus(Corpus(tmp_path / "parts", ROWS, 32, 64), model, 5, 1, kill)
    again = Corpus(tmp_path / "parts", ROWS, 32, 64)
    assert again.rows_done == ROWS // 2
    sample_corpus(again, model, 5, 2, lambda done, total: None)
    assert np.array_equal(again.tokens, whole.tokens)
    assert np.array_equal(again.states, whole.states)


def test_a_corpus_can_grow(tmp_path, model, monkeypatch):
    monkeypatch.setattr("pyinfer_tools.relufy_corpus.BATCH_ROWS", 2)
    whole = Corpus(tmp_path / "whole", ROWS, 32, 64)
    sample_corpus(whole, model, 5, 2, lambda done, total: None)
    sample_corpus(Corpus(tmp_path / "grown", 5, 32, 64), model, 5, 1, lambda done, total: None)
    grown = Corpus(tmp_path / "grown", ROWS, 32, 64)
    assert grown.rows_done == 5
    sample_corpus(grown, model, 5, 1, lambda done, total: None)
    assert np.array_equal(grown.tokens, whole.tokens)
    assert np.array_equal(grown.states, whole.states)


def test_text_becomes_rows_behind_a_bos(tmp_path, model):
    ids = np.arange(31 * 3, dtype=np.int32)
    corpus = Corpus(tmp_path / "text", 3, 32, 64)
    fill_from_text(corpus, model, ids, lambda done, total: None)
    assert np.array_equal(corpus.tokens[:, 1:].ravel(), ids)
    assert (corpus.tokens[:, 0] == 269).all()


def test_gates_are_what_their_definition_says():
    random = torch.Generator().manual_seed(3)
    z, u = (torch.randn(40, 7, generator=random, requires_grad=True) for _ in range(2))
    theta = torch.rand(7, generator=random).requires_grad_()
    h, fired = JumpGate.apply(z, u, theta, torch.full((7,), 1e-6), torch.zeros(()))
    wanted = torch.where(z > theta, z, 0) * u
    torch.testing.assert_close(h, wanted)
    assert torch.equal(fired.long(), (wanted != 0).sum(0))
    # with a step this narrow no gate lies on its edge: the gradients are the ordinary ones
    weights = torch.randn(40, 7, generator=random)
    found = torch.autograd.grad((h * weights).sum(), [z, u])
    for one, other in zip(found, torch.autograd.grad((wanted * weights).sum(), [z, u])):
        torch.testing.assert_close(one, other)


def test_the_price_alone_pushes_gates_down_and_thresholds_up():
    z = torch.tensor([[0.05, 0.15, 0.5]], requires_grad=True)
    theta = torch.full((3,), 0.1, requires_grad=True)
    u = torch.ones(1, 3)
    h, _ = JumpGate.apply(z, u, theta, torch.full((3,), 0.2), torch.tensor(0.6))
    dz, dtheta = torch.autograd.grad(h, [z, theta], torch.zeros(1, 3))
    # the smoothed step has slope 1 / 0.2 inside theta +- 0.1
    torch.testing.assert_close(dz, torch.tensor([[3.0, 3.0, 0.0]]))
    torch.testing.assert_close(dtheta, torch.tensor([-3.0, -3.0, 0.0]))


def test_divergence_and_its_gradient():
    random = torch.Generator().manual_seed(4)
    head = torch.randn(50, 16, generator=random).bfloat16()
    target = torch.randn(9, 16, generator=random).bfloat16()
    state = (target.float() + 0.1 * torch.randn(9, 16, generator=random)).requires_grad_()
    found = HeadDivergence.apply(state, target, head)
    p, q = ((x.double() @ head.double().T).log_softmax(1) for x in (target, state))
    wanted = (p.exp() * (p - q)).sum(1).mean()
    torch.testing.assert_close(found.double(), wanted, rtol=0.03, atol=0)
    one, other = (torch.autograd.grad(x, state)[0].flatten().double() for x in (found, wanted))
    assert torch.nn.functional.cosine_similarity(one, other, dim=0) > 0.999


def test_zero_shares_are_those_of_a_numpy_forward(teacher, student):
    """One layer by hand in float64: the share of gates that do not exceed their threshold."""
    with torch.no_grad():
        student.theta.copy_(torch.rand(2, 96, generator=torch.Generator().manual_seed(5)) * 0.02)
    rows = np.random.default_rng(6).integers(0, 272, (6, 32)).astype(np.int32)
    inputs = []
    hook = student.layers[0].gates
    student.layers[0].gates = lambda x: (inputs.append(x.double().numpy()), hook(x))[1]
    found = measure(student, rows)
    x = np.concatenate(inputs)
    norm = teacher.tensors["model.layers.0.post_attention_layernorm.weight"]
    x = x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * norm
    fired = x @ teacher.tensors[GATE.format(0)].T > student.theta[0].detach().numpy()
    assert 0.2 < fired.mean() < 0.8
    assert found.zero_per_layer[0] == pytest.approx(1 - fired.mean(), abs=1e-3)
    assert found.zero == pytest.approx(np.mean(found.zero_per_layer))
    assert measure(student, rows, threads=3) == found


def test_training_lowers_the_loss_and_reaches_the_wanted_sparsity(student, model, corpus):
    plan = {"tokens": 128 * 300, "rate": 2e-3, "threshold_rate": 0.05, "ramp_until": 0.2, "threads": 1}
    trainer = _trainer(student, model, corpus, **plan)
    trainer.step()
    first = trainer.done.divergence + trainer.done.error
    before = model.embedding.clone()
    while trainer.part() < 1:
        trainer.step()
    assert trainer.done.divergence + trainer.done.error < 0.5 * first
    assert 1 - trainer.done.active == pytest.approx(0.8, abs=0.03)
    assert torch.equal(student.embedding, before)  # as the head does
    assert (student.theta > 0).all()


def test_a_resumed_run_ends_in_the_same_state(tmp_path, teacher, model, corpus):
    def fresh() -> Trainer:
        student = Llama(teacher.shape, sparse=True)
        load_weights(student, teacher.tensors)
        return _trainer(student, model, corpus, threads=2)

    unbroken = fresh()
    for step in range(6):
        unbroken.step()
        if step == 2:
            unbroken.save(tmp_path / "state.pt")
    resumed = fresh()
    resumed.load(tmp_path / "state.pt")
    for _ in range(3):
        resumed.step()
    one, other = save_weights(unbroken.student), save_weights(resumed.student)
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert torch.equal(unbroken.student.theta, resumed.student.theta)
    assert dataclasses.replace(unbroken.done, seconds=0) == dataclasses.replace(resumed.done, seconds=0)


def _run(folder: Path, *more: str):
    given = ["--corpus", "2048", "--heldout", "1024", "--tokens", "40960", "--threads", "2", *more]
    return CliRunner().invoke(relufy.main, [str(FOLDER / "llama"), "-o", str(folder), *given])


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A whole run by the command line: sampled, trained for ten steps, written."""
    folder = tmp_path_factory.mktemp("relufy") / "student"
    found = _run(folder, "--corpus", "8192")
    assert found.exit_code == 0, found.output
    return folder, found.output


def test_the_command_writes_a_checkpoint_and_a_report(exported):
    folder, output = exported
    report = json.loads((folder / "relufy.json").read_text())
    assert report["tokens"] == 40960
    assert report["steps"] == 10
    assert report["heldout_tokens"] == 4 * 255
    assert f"| gates exactly zero   | {report['zero']:.2%} |" in output
    with torch.no_grad():
        teacher = read_teacher(FOLDER / "llama")
        whole = Llama(teacher.shape, sparse=False)
        load_weights(whole, teacher.tensors)
        rows = np.load(folder / "training" / "heldout" / "tokens.npy")
        assert measure(whole, rows).perplexity == pytest.approx(report["teacher_perplexity"])
    assert measure(read_student(folder), rows).perplexity == pytest.approx(report["perplexity"])


def test_the_exported_model_runs_in_pyinfer_as_in_torch(exported, tmp_path):
    folder, _ = exported
    with open_checkpoint(folder) as checkpoint:
        write_gguf(tmp_path / "student.gguf", *converted(checkpoint))
    tokens = np.load(folder / "training" / "heldout" / "tokens.npy")[0, :48]
    with torch.no_grad():
        model = read_student(folder)
        state, fired = model(torch.from_numpy(tokens).long()[None])
        wanted = (state[0] @ model.head_matrix.T).numpy()
    assert 0 < float(fired.sum()) < 0.9 * fired.numel() * len(tokens)
    with (
        load_model(tmp_path / "student.gguf") as loaded,
        contextlib.closing(Session(loaded, 64, 1)) as session,
    ):
        found = session.prefill(tokens, all_logits=True)
    assert np.abs(found - wanted).max() <= 3e-3 * np.abs(wanted).max()  # its cache holds halves


def test_a_second_call_goes_on_and_fresh_begins_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(relufy_run, "CHECK_SECONDS", 0)
    assert _run(tmp_path / "out", "--corpus", "8192", "--tokens", "12288").exit_code == 0
    assert _run(tmp_path / "out", "--corpus", "8192", "--tokens", "20480").exit_code == 0
    report = json.loads((tmp_path / "out" / "relufy.json").read_text())
    assert report["steps"] == 5
    assert [row["step"] for row in report["curve"]] == [1, 2, 3, 4, 5]
    assert _run(tmp_path / "out", "--corpus", "8192", "--tokens", "8192", "--fresh").exit_code == 0
    report = json.loads((tmp_path / "out" / "relufy.json").read_text())
    assert [row["step"] for row in report["curve"]] == [1, 2]


def test_it_learns_from_given_text_and_holds_the_end_back(tmp_path):
    pytest.importorskip("transformers", reason="the extra [train]")
    text = tmp_path / "text.txt"
    text.write_text("".join(f"story {n} is about the number {n * n}. " for n in range(4000)), "utf-8")
    found = _run(tmp_path / "out", "--text", str(text), "--corpus", "20000", "--tokens", "4096")
    assert found.exit_code == 0, found.output
    train, held = (np.load(tmp_path / "out" / "training" / x / "tokens.npy") for x in ("train", "heldout"))
    report = json.loads((tmp_path / "out" / "relufy.json").read_text())
    assert report["text"] == ["text.txt"]
    assert train.shape == (20000 // 255, 256)
    assert (held[:, 0] == 269).all()
    assert not {row.tobytes() for row in train[:, 1:]} & {row.tobytes() for row in held[:, 1:]}


def test_bad_input_is_told_in_a_sentence(tmp_path, exported):
    found = _run(tmp_path / "a", "--corpus", "500")
    assert found.exit_code == 1
    assert "there are 1 rows of 256 tokens to train on and 4 held out, expected" in found.output
    assert _run(tmp_path / "b", "--corpus", "8192", "--tokens", "4096").exit_code == 0
    found = _run(tmp_path / "b", "--corpus", "6144")
    assert found.exit_code == 1
    assert "give the options of the run that made it, or start anew with --fresh" in found.output
    found = _run(tmp_path / "b", "--corpus", "8192", "--state", str(FOLDER / "llama" / "config.json"))
    assert found.exit_code == 1
    assert "config.json: no state of relufy" in found.output
