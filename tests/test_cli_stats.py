"""--sparsity, --stats and the notices of a model: `pyinfer-generate` over tiny real models."""

import json
import re

import numpy as np
import pytest
from checkpoint_files import torch_file
from click.testing import CliRunner
from hf_checkpoints import FOLDER
from toy_engine import toy_llama

import pyinfer_convert.cli
from pyinfer import InputError, Llama
from pyinfer.cli import main
from pyinfer.cli_stats import HEADINGS
from pyinfer.gguf_file import open_gguf
from pyinfer.neurons.cats import to_entry
from pyinfer.neurons.profile import Profile
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer.section import Entry, Section, body_bytes, update_section, write_section

LAYERS, NEURONS, WIDTH = 2, 96, 64
PROMPT = "hello there"
SHARES = {"fired", "computed", "recall", "hot", "skipped"}


def converted(folder, name, *options):
    path = folder / f"{name}.gguf"
    arguments = [str(FOLDER / name), "-o", str(path), "--quant", "f32", *options]
    done = CliRunner().invoke(pyinfer_convert.cli.main, arguments)
    assert done.exit_code == 0, done.stderr
    return path


@pytest.fixture(scope="module")
def relu(tmp_path_factory):
    return converted(tmp_path_factory.mktemp("relu"), "relu_llama")


@pytest.fixture(scope="module")
def with_predictors(tmp_path_factory):
    """Random predictors: some neurons that would have fired are not predicted."""
    folder, random = tmp_path_factory.mktemp("predicted"), np.random.default_rng(5)
    (folder / "predictors").mkdir()
    for layer in range(LAYERS):
        shapes = {"fc1.weight": (16, WIDTH), "fc2.weight": (NEURONS, 16)}
        parts = {name: random.standard_normal(shape).astype("f2") for name, shape in shapes.items()}
        (folder / "predictors" / f"model_{layer}.pt").write_bytes(torch_file(parts))
    (folder / "predictors" / "config.json").write_text('{"sparse_threshold": 0.5}', encoding="utf-8")
    return converted(folder, "relu_llama", "--predictor", str(folder / "predictors"))


@pytest.fixture
def silu(tmp_path):
    """A SiLU model with a profile of its activations."""
    path = converted(tmp_path, "llama")
    tokens = np.random.default_rng(1).integers(0, 256, 40)
    with load_model(path, observe="histogram") as model:
        session = Session(model, 64, 1)
        session.prefill(tokens)
        bins = np.stack([session.observed("histogram", layer) for layer in range(LAYERS)])
        session.close()
    counts = np.zeros((LAYERS, NEURONS), np.int64)
    update_section(path, profile=Profile(counts, len(tokens), [], bins, "silu").to_entry())
    return path


def generate(path, *arguments, prompt=PROMPT):
    command = ["-m", str(path), "--temp", "0", "-n", "12", "-t", "2", "-c", "128", *arguments]
    return CliRunner().invoke(main, [*command, prompt] if prompt is not None else command)


def table(stderr):
    """The table's lines: mode and shares in percent by the first column."""
    lines = stderr.splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith("layer "))
    assert all(heading in lines[start] for heading in HEADINGS)
    found = {}
    for line in lines[start + 1 :]:
        name, *mode = re.sub(r"[\d.-]+%", "", line).split()
        found[name] = (mode, [float(each) for each in re.findall(r"([\d.-]+)%", line)])
    return lines[start], found


# -- the figures


def test_what_fired_is_what_a_dense_run_of_the_same_tokens_counts(relu):
    answer = json.loads(generate(relu, "--stats", "--json").stdout)
    with Llama(relu, n_ctx=128) as llm:
        tokens = [*llm.tokenize(PROMPT), *answer["tokens"][:-1]]
    with load_model(relu, sparsity="dense", observe="fired") as model:
        session = Session(model, 128, 1)
        session.prefill(tokens)
        counts = [session.observed("fired", layer) for layer in range(LAYERS)]
        session.close()
    assert answer["sparsity"]["tokens"] == len(tokens)
    for layer, found in enumerate(answer["sparsity"]["layers"]):
        assert found.keys() == {"layer", "mode"} | SHARES
        assert (found["layer"], found["mode"], found["computed"], found["recall"]) == (layer, "exact", 1, 1)
        assert found["fired"] == pytest.approx(counts[layer].sum() / (len(tokens) * NEURONS), abs=1e-9)
        assert 0 < found["fired"] < 1
        assert found["skipped"] == pytest.approx(2 / 3 * (1 - found["fired"]))  # of gate, up and down
    for name, mean in answer["sparsity"]["all"].items():
        assert mean == pytest.approx(np.mean([each[name] for each in answer["sparsity"]["layers"]]))


@pytest.mark.parametrize("mode", ["auto", "exact", "predicted", "dense"])
def test_the_table_has_the_figures_of_the_object(with_predictors, mode):
    shown = generate(with_predictors, "--stats", "--sparsity", mode)
    answer = json.loads(generate(with_predictors, "--stats", "--sparsity", mode, "--json").stdout)
    heading, lines = table(shown.stderr)
    stats = answer["sparsity"]
    assert heading.endswith(f"over {stats['tokens']} tokens")
    assert shown.stdout.rstrip("\n") == answer["text"].rstrip("\n")
    expected = "predicted" if mode == "auto" else mode
    for layer in stats["layers"]:
        found_mode, shares = lines.pop(str(layer["layer"]))
        assert found_mode == [layer["mode"]] == [expected]
        assert shares == [
            pytest.approx(100 * layer[key], abs=0.051)
            for key in ("fired", "computed", "recall", "hot", "skipped")
        ]
        assert (layer["recall"] < 1) == (layer["computed"] < 1) == (expected == "predicted")
    assert lines.pop("all")[0] == [] and not lines


def test_the_table_is_written_only_when_it_is_asked_for(relu):
    assert "skipped" not in generate(relu).stderr
    assert "sparsity" not in json.loads(generate(relu, "--json").stdout)
    assert "layer " not in generate(relu, "--json", "--stats").stderr


def test_nothing_to_count(relu):
    shown = generate(relu, "--stats", "-n", "1", prompt=PROMPT * 4)  # a prompt of many rows, and no step
    assert shown.exit_code == 0 and "nothing was counted" in shown.stderr
    stats = json.loads(generate(relu, "--stats", "--json", "-n", "1", prompt=PROMPT * 4).stdout)["sparsity"]
    assert stats == {"tokens": 0, "layers": [], "all": None}


def test_a_chat_has_a_table_after_each_answer(relu, monkeypatch):
    lines = iter(["a", "bcd", "/exit"])
    monkeypatch.setattr("pyinfer.cli._prompt", lambda options: None)
    monkeypatch.setattr("pyinfer.cli._read_line", lambda: next(lines))
    shown = generate(relu, "--stats", "--chat", prompt=None)
    assert shown.exit_code == 0, shown.stderr
    headings = [line for line in shown.stderr.splitlines() if line.startswith("layer ")]
    tokens = [int(re.search(r"over (\d+) tokens", line)[1]) for line in headings]
    assert len(tokens) == 2 and tokens[1] < 2 * tokens[0]  # of one answer, not of all so far


# -- modes


@pytest.mark.parametrize(
    "value", ["", "sometimes", "exact=0.5", "cats", "cats=", "cats=0", "cats=1", "cats=nan", "cats=-1"]
)
def test_an_unknown_mode_is_wrong_usage_before_anything_is_loaded(value):
    def never(_):
        raise AssertionError("the model was opened")

    result = CliRunner().invoke(main, ["Hi", "--sparsity", value], obj=never)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1].startswith(f"Error: --sparsity is {value!r}, expected ")


@pytest.mark.parametrize("mode", ["exact", "predicted", "cats=0.5"])
def test_a_mode_that_a_model_cannot_do_is_one_sentence(tmp_path, mode):
    result = generate(converted(tmp_path, "llama"), "--sparsity", mode)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1].startswith("error: ") and "Traceback" not in result.stderr


def test_exact_and_dense_say_the_same(relu):
    assert generate(relu, "--sparsity", "exact").stdout == generate(relu, "--sparsity", "dense").stdout


# -- what the user should read


@pytest.mark.parametrize(
    ("measured", "share", "expected"),
    [
        ({0: 10.0, 0.25: 10.2, 0.5: 11.0}, "0.25", "perplexity 2.0 % higher on the profile's held-out text"),
        ({0: 10.0, 0.25: 10.2, 0.5: 11.0}, "0.4", "perplexity 6.8 % higher on the profile's held-out text"),
        ({0: 10.0, 0.5: 9.9}, "0.5", "perplexity 1.0 % lower on the profile's held-out text"),
        ({0: 10.0, 0.25: 10.2}, "0.4", "the loss was not measured; pyinfer-convert profile measures it"),
        (None, "0.4", "the loss was not measured; pyinfer-convert profile measures it"),
    ],
)
def test_the_price_of_thresholds_is_told(silu, measured, share, expected):
    if measured is not None:
        update_section(silu, thresholds=to_entry(measured))
    result = generate(silu, "--sparsity", f"cats={share}", "--stats")
    assert result.exit_code == 0, result.stderr
    assert f"cats={share}: {expected}" in result.stderr
    told = result.stderr.index(f"cats={share}: ")
    assert told < result.stderr.index("prompt tokens at")
    fired = table(result.stderr)[1]["all"][1][0]
    assert abs(fired - 100 * (1 - float(share))) < 8  # of a few tokens, by the profile of others


def test_a_price_that_cannot_be_read_is_told(silu):
    update_section(silu, thresholds=Entry({"perplexity": {"0": "ten"}}))
    result = generate(silu, "--sparsity", "cats=0.5")
    assert result.exit_code == 0
    assert "cats=0.5: the loss is not known, the thresholds hold perplexity 'ten'" in result.stderr


def test_notices_of_the_model_come_before_the_answer(tmp_path):
    path = converted(tmp_path, "relu_llama")
    whole = generate(path)
    assert "note:" not in whole.stderr
    write_section(path, Section({"profile": Entry({"tokens": "many"})}))
    with open_gguf(path) as file:
        end = body_bytes(file)
    data = bytearray(path.read_bytes())
    data[end + 70] ^= 1
    path.write_bytes(data)
    damaged = generate(path)
    assert damaged.exit_code == 0 and damaged.stdout == whole.stdout
    first = damaged.stderr.splitlines()[0]
    assert first.startswith("note: ") and "the model runs without it" in first
    with Llama(path, n_ctx=64) as llm:
        assert [f"note: {each}" for each in llm.notices] == [first]


# -- class Llama


def test_figures_of_the_library(relu):
    with Llama(relu, n_ctx=128, sparsity="exact", observe="stats") as llm:
        assert llm.notices == []
        with pytest.raises(InputError, match="nothing was counted yet"):
            llm.sparsity_stats()
        llm(PROMPT, max_tokens=5)
        assert [each.layer for each in llm.sparsity_stats()] == list(range(LAYERS))
    with pytest.raises(InputError, match="is closed"):
        llm.sparsity_stats()
    with (
        Llama(relu, n_ctx=128) as llm,
        pytest.raises(InputError, match='load the model with observe="stats"'),
    ):
        llm.sparsity_stats()


@pytest.mark.parametrize(
    "keywords", [{"sparsity": 0.5}, {"sparsity": None}, {"sparsity": "x"}, {"observe": "y"}]
)
def test_wrong_keywords(relu, keywords):
    (name,) = keywords
    with pytest.raises(InputError, match=f"^{name} is .*expected"):
        Llama(relu, **keywords)


def test_a_toy_has_no_notices():
    assert toy_llama().notices == []
