"""pyinfer-convert profile: counts equal the reference executor's, whatever stops it."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from checkpoint_files import torch_file, torch_tensor_pickle
from click.testing import CliRunner
from golden_files import dequantize
from hf_checkpoints import convert_f32

from pyinfer.gguf_file import open_gguf
from pyinfer.models import build_program
from pyinfer.neurons.profile import Profile
from pyinfer.program.reference import Reference
from pyinfer.program.sparsity import FFNPlan
from pyinfer.section import Entry, read_section, update_section
from pyinfer.text.tokenizer import Tokenizer
from pyinfer_convert import cli_profile
from pyinfer_convert.cli_profile import profile

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "the",
    "dog",
    "ran",
    "to",
    "it",
    "while",
    "birds",
    "sang",
    "in",
    "trees",
    "near",
    "water",
]


def story(seed: int, n_words: int) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(WORDS) + draw.choice([" ", " ", " ", ".\n"]) for _ in range(n_words))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """F32 models of two layers and 96 neurons, with a tokenizer: ReLU and SiLU; texts a and b."""
    folder = tmp_path_factory.mktemp("made")
    found = {}
    for name in ("relu_llama", "llama"):
        found[name] = convert_f32(name, folder / f"{name}.gguf")
    for seed, name in enumerate("ab"):
        found[name] = folder / f"{name}.txt"
        found[name].write_text(story(seed, 700), encoding="utf-8")
    return found


@pytest.fixture
def model(made: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copyfile(made["relu_llama"], tmp_path / "model.gguf")


@pytest.fixture
def silu(made: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copyfile(made["llama"], tmp_path / "silu.gguf")


def run(*arguments: object, code: int = 0) -> str:
    done = CliRunner().invoke(profile, [str(each) for each in arguments])
    assert done.stdout == "" and done.exit_code == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def stored(path: Path) -> Profile | None:
    with open_gguf(path) as file:
        section = read_section(file)
        hparams = build_program(file)[0]
    entry = section.entries.get("profile") if section else None
    return entry and Profile.from_entry(entry, hparams.block_count, hparams.feed_forward_length)


def same(one: Profile | None, other: Profile | None, *, ordered: bool = True) -> bool:
    assert one is not None and other is not None and one.tokens == other.tokens > 0
    assert np.array_equal(one.counts, other.counts)
    assert (one.histogram is None) == (other.histogram is None)
    assert one.histogram is None or np.array_equal(one.histogram, other.histogram)
    texts = [[str(each) for each in profile.corpus] for profile in (one, other)]
    assert texts[0] == texts[1] if ordered else set(texts[0]) == set(texts[1])
    return True


def windows(path: Path, text: Path) -> list[list[int]]:
    """The windows of a text, cut without the code under test."""
    with open_gguf(path) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    ids = tokenizer.encode(text.read_text(encoding="utf-8"), bos=False)
    head = [tokenizer.bos_id] if tokenizer.add_bos else []
    each = 256 - len(head)
    return [head + ids[start : start + each] for start in range(0, len(ids), each)]


def observed(path: Path, what: str, cut: list[list[int]]) -> list[np.ndarray]:
    """What the reference executor (float64) sees in each layer, [tokens, neurons]."""
    with open_gguf(path) as file:
        program = build_program(file, FFNPlan(observe=what))[1]
        rows: list[list[np.ndarray]] = [[], []]
        for window in cut:
            executor = Reference(program, dequantize)
            executor.step(window, range(len(window)), [0] * len(window), [0])
            for layer in range(2):
                rows[layer] += executor.observed[what, layer]
    return [np.concatenate(each) for each in rows]


def test_counts_are_those_of_the_reference(model: Path, made: dict[str, Path]) -> None:
    said = run(model, "--text", made["a"])
    cut = windows(model, made["a"])
    assert len(cut) > 3 and 0 < len(cut[-1]) < 256
    found = stored(model)
    assert found is not None and found.tokens == sum(map(len, cut)) and found.histogram is None
    for layer, hidden in enumerate(observed(model, "fired", cut)):
        expected = (hidden != 0).sum(0)
        assert 0.2 < expected.mean() / found.tokens < 0.8  # not all or nothing
        # float32 and float64 disagree where a sum is nearly zero
        assert np.abs(found.counts[layer] - expected).sum() <= 2
    expected = {"name": "a.txt", "windows": len(cut), "tokens": found.tokens}
    assert [{key: each[key] for key in expected} for each in found.corpus] == [expected]
    assert found.activation == "relu" and found.window_tokens == 256
    assert f"profile: {found.tokens} tokens of 1 text; a neuron fires for " in said


def test_silu_models_get_magnitudes(silu: Path, made: dict[str, Path]) -> None:
    said = run(silu, "--text", made["a"], "-v")
    found = stored(silu)
    assert found is not None and found.histogram is not None and not found.counts.any()
    for layer, values in enumerate(observed(silu, "histogram", windows(silu, made["a"]))):
        magnitudes = np.abs(values).ravel()
        for share in (0.25, 0.5, 0.9):
            exact = np.quantile(magnitudes, share)
            assert abs(found.quantile(layer, share) / exact - 1) < 0.02
        assert f"  layer {layer}: {found.quantile(layer, 0.5):.3g}\n" in said


@pytest.mark.parametrize("kind", ["relu", "silu"])
def test_threads_do_not_count(
    kind: str, model: Path, silu: Path, made: dict[str, Path], tmp_path: Path
) -> None:
    path = model if kind == "relu" else silu
    other = shutil.copyfile(path, tmp_path / "other.gguf")
    run(path, "--text", made["a"], "--threads", 1)
    run(other, "--text", made["a"], "--threads", 2)
    assert same(stored(path), stored(other))


def test_texts_in_two_runs_equal_one_run(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copyfile(model, tmp_path / "other.gguf")
    run(model, "--text", made["a"], made["b"])
    run(other, "--text", made["b"])
    assert "2 texts" in run(other, "--text", made["a"])
    assert same(stored(model), stored(other), ordered=False)
    third = shutil.copyfile(other, tmp_path / "third.gguf")
    run(third, "--fresh", "--text", made["a"], "--text", made["b"])
    assert same(stored(model), stored(third))


def test_more_tokens_later_equal_all_at_once(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    other = shutil.copyfile(model, tmp_path / "other.gguf")
    both = ["--text", made["a"], made["b"]]
    run(model, *both)
    total = stored(model).tokens  # type: ignore[union-attr]
    for tokens in (1, 600, 601, total - 300, total):
        said = run(other, *both, "--tokens", tokens)
        found = stored(other)
        assert found is not None and tokens <= found.tokens < tokens + 256 + 255
        assert ("b.txt is not reached" in said) == (len(found.corpus) == 1)
    assert same(stored(model), stored(other))


def test_the_same_text_counts_once(model: Path, made: dict[str, Path], tmp_path: Path) -> None:
    twin = shutil.copyfile(made["a"], tmp_path / "twin.txt")
    assert "twin.txt is the same text as a.txt" in run(model, "--text", made["a"], twin)
    before = model.read_bytes()
    assert "all of this is counted already; nothing was changed" in run(model, "--text", twin)
    assert model.read_bytes() == before


class Stopped(BaseException):
    """A kill: nothing of ours runs behind it."""


@pytest.mark.parametrize("save_seconds", [0.0, 1e9])
def test_a_killed_run_goes_on(
    model: Path, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_seconds: float
) -> None:
    """Stopped behind every window in turn, with what was saved until then or nothing."""
    whole = shutil.copyfile(model, tmp_path / "whole.gguf")
    both = ["--text", str(made["a"]), str(made["b"])]
    run(whole, *both)
    add = cli_profile._Counter.add
    seen = 0

    def stop(self, corpus, window) -> None:
        nonlocal seen
        if seen == 2:
            raise Stopped
        seen += 1
        add(self, corpus, window)

    monkeypatch.setattr(cli_profile, "SAVE_SECONDS", save_seconds)
    monkeypatch.setattr(cli_profile._Counter, "add", stop)
    counts = []
    for _ in range(3):
        seen = 0
        with pytest.raises(Stopped):
            CliRunner().invoke(profile, [str(model), *both], catch_exceptions=False)
        found = stored(model)
        counts.append(found.tokens if found else 0)
    assert counts == ([512, 1024, 1536] if save_seconds == 0 else [0, 0, 0])
    monkeypatch.setattr(cli_profile._Counter, "add", add)
    said = run(model, *both)
    assert ("1536 of " in said and "are counted already; going on" in said) == (save_seconds == 0)
    assert same(stored(model), stored(whole))


def test_an_interrupted_run_saves_and_goes_on(
    model: Path, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = shutil.copyfile(model, tmp_path / "whole.gguf")
    run(whole, "--text", made["a"])
    add = cli_profile._Counter.add

    def interrupted(self, corpus, window) -> None:
        add(self, corpus, window)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(cli_profile._Counter, "add", interrupted)
    for number in (1, 2):
        said = run(model, "--text", made["a"], code=130)
        assert "interrupted; what was counted is saved, and the same command goes on from there" in said
        assert stored(model).tokens == 256 * number  # type: ignore[union-attr]
    monkeypatch.undo()
    run(model, "--text", made["a"])
    assert same(stored(model), stored(whole))


KILLED = """
import os, random, signal, sys, time
from click.testing import CliRunner
import pyinfer.runtime.session, pyinfer.runtime.loader, pyinfer.models.llama  # once, before the forks
from pyinfer_convert import cli_profile
cli_profile.SAVE_SECONDS = 0.0
for _ in range(int(sys.argv[1])):
    child = os.fork()
    if not child:
        done = CliRunner().invoke(cli_profile.profile, sys.argv[2:])
        os._exit(done.exit_code)
    before = os.stat(sys.argv[2]).st_mtime_ns
    while os.stat(sys.argv[2]).st_mtime_ns == before and not os.waitpid(child, os.WNOHANG)[0]:
        time.sleep(0.002)
    time.sleep(random.uniform(0.0, 0.02))  # it saves all the time
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starting a program anew each time takes too long")
def test_kills_leave_a_file_that_loads_and_goes_on(model: Path, tmp_path: Path) -> None:
    whole, body = shutil.copyfile(model, tmp_path / "whole.gguf"), model.read_bytes()
    texts = [tmp_path / f"{number}.txt" for number in range(6)]
    for number, each in enumerate(texts):
        each.write_text(story(number, 20_000), encoding="utf-8")
    command = [str(model), "--threads", "1", "--tokens", "40000", "--text", *map(str, texts)]
    program = [sys.executable, "-c", KILLED, "6", *command]
    done = subprocess.run(program, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert model.read_bytes().startswith(body)
    assert stored(model).tokens > 0  # type: ignore[union-attr]
    run(*command)
    run(whole, *command[1:])
    assert same(stored(model), stored(whole))


def write_counts(folder: Path, *layers: np.ndarray) -> None:
    for layer, array in enumerate(layers):
        (folder / f"activation_{layer}.pt").write_bytes(torch_file({"": array}, torch_tensor_pickle(array)))


@pytest.fixture
def counts(tmp_path: Path) -> Path:
    (tmp_path / "activation").mkdir()
    write_counts(tmp_path / "activation", np.arange(96), 2 * np.arange(96))
    return tmp_path / "activation"


def test_powerinfers_counts_become_a_profile(model: Path, made: dict[str, Path], counts: Path) -> None:
    """Of how many tokens they do not say: the neuron that fired most fired for all."""
    run(model, "--import", counts)
    found = stored(model)
    assert found is not None and found.tokens == 190 and found.share.max() == 1
    assert np.array_equal(found.counts, np.outer([1, 2], np.arange(96)))
    assert found.corpus[0]["name"] == "activation" and found.corpus[0]["from"] == "PowerInfer"
    assert "are in the profile already; nothing was changed" in run(model, "--import", counts)
    run(model, "--text", made["a"])
    assert len(stored(model).corpus) == 2  # type: ignore[union-attr]
    run(model, "--fresh", "--import", counts)
    assert same(stored(model), found)


def test_shares_become_counts(model: Path, counts: Path) -> None:
    write_counts(counts, *[np.linspace(0, 0.5, 96)] * 2)
    run(model, "--import", counts)
    found = stored(model)
    assert found is not None and found.tokens == 1_000_000
    np.testing.assert_allclose(found.share, np.tile(np.linspace(0, 0.5, 96), (2, 1)), atol=1e-6)


def test_imports_that_cannot_be(model: Path, silu: Path, counts: Path) -> None:
    assert "activation silu is hardly ever zero" in run(silu, "--import", counts, code=1)
    write_counts(counts, np.arange(96), np.full(96, 1.5))
    assert "fractions, expected whole counts or shares" in run(model, "--import", counts, code=1)
    write_counts(counts, *[np.zeros(96, np.int64)] * 2)
    assert "the highest count is 0, expected 1 to" in run(model, "--import", counts, code=1)
    (counts / "activation_1.pt").unlink()
    assert "has activations of 1 layers, the model has 2" in run(model, "--import", counts, code=1)
    assert stored(model) is None


def test_other_entries_stay(model: Path, made: dict[str, Path]) -> None:
    update_section(model, placement=Entry({"x": 1}))
    run(model, "--text", made["a"], "--tokens", 256)
    run(model, "--fresh", "--text", made["b"], "--tokens", 256)
    with open_gguf(model) as file:
        assert read_section(file).entries["placement"].info == {"x": 1}  # type: ignore[union-attr]
    assert [each["name"] for each in stored(model).corpus] == ["b.txt"]  # type: ignore[union-attr]


def test_a_damaged_section_needs_fresh(model: Path, made: dict[str, Path]) -> None:
    run(model, "--text", made["a"], "--tokens", 256)
    data = bytearray(model.read_bytes())
    data[-100] ^= 1
    model.write_bytes(data)
    said = run(model, "--text", made["a"], code=1)
    assert (
        said.startswith("error: model.gguf: its placement section has a checksum") and said.count("\n") == 1
    )
    assert "`pyinfer-convert profile --fresh` makes a new one" in said and model.read_bytes() == data
    assert "section that could not be read is replaced" in run(model, "--fresh", "--text", made["a"])
    assert stored(model).tokens > 1000  # type: ignore[union-attr]


def test_a_profile_that_does_not_fit_needs_fresh(model: Path, made: dict[str, Path]) -> None:
    for shape, words in (((2, 95), "counts is int64 [2, 95]"), ((2, 96), "of 128 cannot be added")):
        old = Profile(np.zeros(shape, np.int64), 5, [], None, "relu", 128)
        update_section(model, profile=old.to_entry())
        before = model.read_bytes()
        said = run(model, "--text", made["a"], code=1)
        assert words in said and "--fresh counts anew" in said and model.read_bytes() == before
    run(model, "--text", made["a"], "--fresh", "--tokens", 1)


def test_bad_input_is_one_sentence(
    model: Path, made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "binary").write_bytes(b"\x00\xff")
    (tmp_path / "empty").touch()
    before = model.read_bytes()
    for arguments, words in (
        ((model, "--text", tmp_path / "empty"), "the file is empty"),
        ((model, "--text", tmp_path / "binary"), "byte 0 is 0, expected plain text"),
        ((model, "--text", made["a"], tmp_path / "none"), "none: cannot be read"),
        ((model, "--import", tmp_path / "none"), "no such folder"),
        ((tmp_path / "none.gguf", "--text", made["a"]), "no such file"),
        ((made["a"], "--text", made["a"]), "not a GGUF file"),
    ):
        said = run(*arguments, code=1)
        assert said.startswith("error: ") and words in said and said.count("\n") == 1
    assert model.read_bytes() == before
    run(model, code=2)
    run(model, "--text", made["a"], "--import", tmp_path, code=2)
    run(model, "--text", made["a"], "--tokens", 0, code=2)
    monkeypatch.setenv("PYINFER_CACHE_DIR", str(tmp_path))
    (tmp_path / "models").mkdir()
    kept = shutil.copyfile(model, tmp_path / "models" / "kept.gguf")
    assert "is kept as it was fetched, expected a file of your own" in run(kept, "--text", made["a"], code=1)
