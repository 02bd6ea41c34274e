"""pyinfer-convert profile measures what skipping costs, on text that it did not count."""

from __future__ import annotations

import math
import random
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from hf_checkpoints import convert_f32

from pyinfer.gguf_file import open_gguf
from pyinfer.neurons.cats import from_entry
from pyinfer.runtime import loss
from pyinfer.section import Entry, read_section, update_section
from pyinfer.text.tokenizer import Tokenizer
from pyinfer_convert import held_out
from pyinfer_convert.cli_profile import profile
from pyinfer_convert.held_out import MOST_WINDOWS, SHARES, choose_windows, describe_loss

WINDOW = 256
WORDS = ("the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "while", "birds", "sang", "in", "trees")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A SiLU and a ReLU model with tokenizers, a text of about 9 windows and one of about 4."""
    folder = tmp_path_factory.mktemp("made")
    found = {}
    for name in ("llama", "relu_llama"):
        found[name] = convert_f32(name, folder / f"{name}.gguf")
    for name, count in (("long", 600), ("short", 250)):
        draw = random.Random(count)
        found[name] = folder / f"{name}.txt"
        found[name].write_text("".join(f"{draw.choice(WORDS)}\n" for _ in range(count)), encoding="utf-8")
    return found


@pytest.fixture
def model(made: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copyfile(made["llama"], tmp_path / "silu.gguf")


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[list[list[int]]]:
    """The windows of every measurement, which really happens."""
    seen, real = [], loss.measure

    def measure(path, windows, shares, *rest):
        seen.append([window.tolist() for window in windows])
        return real(path, windows, shares, *rest)

    monkeypatch.setattr(loss, "measure", measure)
    return seen


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(profile, [str(each) for each in arguments])
    assert done.stdout == "" and done.exit_code == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def entries(path: Path) -> dict[str, Entry]:
    with open_gguf(path) as file:
        section = read_section(file)
    return dict(section.entries) if section else {}


def windows(path: Path, text: Path) -> list[list[int]]:
    """The windows of a text, cut without the code under test."""
    with open_gguf(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), bos=False)
    head = [tokenizer.bos_id] if tokenizer.add_bos else []
    each = WINDOW - len(head)
    return [head + ids[start : start + each] for start in range(0, len(ids), each)]


def test_the_loss_is_measured_behind_what_was_counted(model, made, measured):
    cut = windows(model, made["long"])
    assert 6 < len(cut) <= MOST_WINDOWS
    said = run(model, "--text", made["long"], "--tokens", 2 * WINDOW)
    assert measured == [cut[2:]]
    stored = from_entry(entries(model)["thresholds"])
    expected = loss.measure(model, [np.array(window) for window in cut[2:]], SHARES)
    assert stored == pytest.approx(expected, rel=1e-6) and list(stored) == [0.0, *SHARES]
    n_tokens = sum(map(len, cut[2:]))
    assert f"loss: perplexity {stored[0.0]:.4g} on {n_tokens} tokens that were not counted, with" in said
    assert f"cats=0.5 {stored[0.5] / stored[0.0] - 1:+.1%}" in said


def test_another_profile_is_measured_anew(model, made, measured):
    cut = windows(model, made["long"])
    run(model, "--text", made["long"], "--tokens", WINDOW)
    run(model, "--text", made["long"], "--tokens", 4 * WINDOW)
    assert measured == [cut[1:], cut[4:]]
    before = model.read_bytes()
    for tokens in (4 * WINDOW, WINDOW):  # fewer change nothing, either
        assert "nothing was changed" in run(model, "--text", made["long"], "--tokens", tokens)
    assert model.read_bytes() == before and len(measured) == 2
    assert "thresholds" in entries(model)
    run(model, "--text", made["short"], "--tokens", WINDOW, "--no-loss")
    assert "thresholds" not in entries(model) and len(measured) == 2
    said = run(model, "--text", made["long"], "--tokens", WINDOW)
    assert measured[2:] == [cut[4:]] and "counted already (more" in said  # behind all that was counted


def test_several_texts_take_turns(model, made, measured):
    long, short = windows(model, made["long"]), windows(model, made["short"])
    run(model, "--text", made["short"], "--tokens", WINDOW, "--no-loss")
    run(model, "--text", made["short"], made["long"], "--tokens", (len(short) + 2) * WINDOW)
    assert measured == [long[2:]]  # nothing of the short one is left
    run(model, "--fresh", "--text", made["short"], "--tokens", WINDOW)
    assert measured[1:] == [short[1:]]


def test_texts_that_are_counted_whole_leave_nothing_to_measure(model, made, measured):
    said = run(model, "--text", made["short"])
    assert "was not measured, as all of the text is counted" in said and measured == []
    assert entries(model).keys() == {"profile"}


def test_models_with_zeros_have_no_such_loss(made, measured, tmp_path):
    relu = shutil.copyfile(made["relu_llama"], tmp_path / "relu.gguf")
    assert "loss" not in run(relu, "--text", made["long"], "--tokens", WINDOW)
    assert measured == [] and entries(relu).keys() == {"profile"}


def test_an_interrupted_measurement_is_done_later(model, made, monkeypatch, measured):
    real, kept = loss.perplexity, []

    def interrupted(session, windows, progress):
        kept.append(entries(model))
        signal.raise_signal(signal.SIGINT)
        return real(session, windows, progress)

    monkeypatch.setattr(loss, "perplexity", interrupted)
    arguments = (model, "--text", made["long"], "--tokens", WINDOW)
    said = run(*arguments, code=130)
    assert "what was counted is saved, and the same command goes on from there" in said
    assert len(kept) == 1 and entries(model).keys() == kept[0].keys() == {"profile"}
    monkeypatch.setattr(loss, "perplexity", real)
    run(*arguments)
    assert entries(model).keys() == {"profile", "thresholds"}
    assert entries(model)["profile"].info == kept[0]["profile"].info


def test_an_entry_that_says_nothing_is_replaced(model, made, measured):
    run(model, "--text", made["long"], "--tokens", WINDOW, "--no-loss")
    update_section(model, thresholds=Entry({"perplexity": {"0": "ten"}}))
    run(model, "--text", made["long"], "--tokens", WINDOW)
    assert len(measured) == 1 and 0.5 in from_entry(entries(model)["thresholds"])


@pytest.mark.parametrize("value", [math.nan, 1e300])
def test_a_model_that_knows_nothing_stores_nothing(model, made, monkeypatch, value):
    monkeypatch.setattr(loss, "perplexity", lambda *_: value)
    said = run(model, "--text", made["long"], "--tokens", WINDOW)
    assert "is not stored: the thresholds hold perplexity" in said
    assert entries(model).keys() == {"profile"}


def test_windows_are_few_and_of_all_texts():
    texts = [[np.full(length, 10 * text + n) for n, length in enumerate((4, 3, 9))] for text in range(3)]
    assert [int(window[0]) for window in choose_windows(texts)] == [0, 10, 20, 2, 12, 22]
    assert choose_windows([[], [np.arange(3)]]) == []
    many = [[np.arange(5)] * 50, [np.arange(7)] * 3]
    assert [len(window) for window in choose_windows(many)] == [5, 7] * 3 + [5] * (MOST_WINDOWS - 6)


def test_the_line_for_people():
    line = describe_loss({0.0: 10.0, 0.25: 10.1, 0.5: 12.5}, 99)
    assert line == (
        "loss: perplexity 10 on 99 tokens that were not counted, "
        "with --sparsity cats=0.25 +1.0%, cats=0.5 +25.0%"
    )


def test_it_is_bounded(model, made, monkeypatch, measured):
    monkeypatch.setattr(held_out, "MOST_WINDOWS", 3)
    run(model, "--text", made["long"], "--tokens", WINDOW)
    assert measured == [windows(model, made["long"])[1:4]]
