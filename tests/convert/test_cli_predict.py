"""pyinfer-convert predict: what the new file holds and how good it is, measured by the reference executor."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from golden_files import dequantize
from hf_checkpoints import convert_f32

from pyinfer import names
from pyinfer.errors import CapacityError
from pyinfer.gguf_file import open_gguf
from pyinfer.models import build_program
from pyinfer.neurons.predictor import Predictors, predictor_ranks
from pyinfer.program.reference import Reference
from pyinfer.program.sparsity import FFNPlan
from pyinfer.runtime.loader import load_model
from pyinfer.section import Entry, read_section, update_section
from pyinfer.text.tokenizer import Tokenizer
from pyinfer_convert import calibration, cli, predictor_file

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "while", "birds", "sang", "in", "trees"]
FAMILIES = ("relu_llama", "prosparse_llama", "mistral_drelu", "opt", "nemotron_bias")
TOKENS = 4096


def run(*arguments):
    return CliRunner().invoke(cli.main, ["predict", *map(str, arguments)])


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    draw = random.Random(0)
    made = tmp_path_factory.mktemp("text") / "text.txt"
    made.write_text("".join(draw.choice(WORDS) + draw.choice("  .\n") for _ in range(4000)), encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def made(tmp_path_factory, text):
    """By family: the model, the same with predictors, and what the command said."""
    found = {}

    def make(name):
        if name not in found:
            folder = tmp_path_factory.mktemp(name)
            model, target = convert_f32(name, folder / "model.gguf"), folder / "predicted.gguf"
            done = run(model, "--text", text, "-o", target, "--tokens", TOKENS)
            assert done.exit_code == 0, done.stderr
            found[name] = model, target, done.stderr
        return found[name]

    return make


def stored(path):
    with open_gguf(path) as file:
        n_layers, n_neurons = (
            file.require(key, int) for key in (names.BLOCK_COUNT, names.FEED_FORWARD_LENGTH)
        )
        section = read_section(file)
        assert section is not None
        found = Predictors.from_entry(section.entries["predictors"], n_layers, n_neurons)
        found.agree_with(
            predictor_ranks(file, n_layers, file.require(names.EMBEDDING_LENGTH, int), n_neurons)
        )
        return found


@pytest.mark.parametrize("name", FAMILIES)
def test_its_figures_are_those_of_the_reference(made, text, name):
    """The model in float64 over the text that was held out, the predictors as gguf-py reads them."""
    _, target, said = made(name)
    found = stored(target)
    with open_gguf(target) as file:
        reference = Reference(build_program(file, FFNPlan(observe="rows"))[1], dequantize)
        tokenizer = Tokenizer.from_metadata(file.metadata)
        held_out = calibration.read_windows(
            [text], tokenizer, file.require(names.CONTEXT_LENGTH, int), TOKENS
        )
        for index, window in enumerate(held_out.parts["measure"]):
            n = len(window)
            reference.step(window, np.arange(n), np.full(n, index), [0])
        matrices = {
            layer: [dequantize(file.tensors[names.weight(part, layer)]) for part in ("fc1", "fc2")]
            for layer in range(len(found.layers))
        }
    for layer, each in enumerate(found.layers):
        x, hidden = (np.concatenate(reference.observed[what, layer]) for what in ("x", "hidden"))
        fc1, fc2 = matrices[layer]
        predicted, fired = x @ fc1.T @ fc2.T >= found.thresholds[layer], hidden != 0
        assert each.tokens == len(x)
        assert each.fired == pytest.approx(fired.mean(), abs=0.01)
        assert each.predicted == pytest.approx(predicted.mean(), abs=0.02)
        assert each.recall == pytest.approx((predicted & fired).sum() / fired.sum(), abs=0.01)
        assert each.precision == pytest.approx((predicted & fired).sum() / predicted.sum(), abs=0.02)
        assert each.recall > 0.97 and each.predicted < 1  # tiny random models and little text
        assert f"{each.precision:.1%}" in said
    assert "tokens that nothing was fitted to" in said


def test_the_rest_of_the_file_is_as_it_was(made):
    before, after, _ = made("relu_llama")
    old, new = gguf.GGUFReader(before), gguf.GGUFReader(after)
    tensors = {each.name: each for each in new.tensors}
    for each in old.tensors:
        assert each.tensor_type == tensors[each.name].tensor_type
        np.testing.assert_array_equal(each.data, tensors[each.name].data)
    added = [name for name in tensors if name not in {each.name for each in old.tensors}]
    assert sorted(added) == sorted(names.weight(part, layer) for layer in (0, 1) for part in ("fc1", "fc2"))
    assert {tensors[name].tensor_type.name for name in added} == {"Q4_0"}
    assert list(old.fields) == list(new.fields)
    budget = sum(each.n_bytes for each in old.tensors if ".ffn_" in each.name and each.data.ndim == 2) * 0.08
    assert sum(tensors[name].n_bytes for name in added) <= budget


def test_it_runs_predicted_and_says_so(made):
    with load_model(made("relu_llama")[1], sparsity="predicted") as model:
        assert [layer.mode for layer in model.plan.layers] == ["predicted", "predicted"]
        assert {layer.form for layer in model.plan.layers} == {"linear"}
        assert model.notices == []


def test_the_profile_is_kept_and_placements_are_not(made, text, tmp_path):
    model = tmp_path / "model.gguf"
    model.write_bytes(made("relu_llama")[0].read_bytes())
    counts = np.arange(12, dtype=np.int64)
    update_section(model, profile=Entry({"a": 1}, {"counts": counts}), placement=Entry({"b": 2}))
    done = run(model, "--text", text, "--tokens", 2048, "-o", tmp_path / "new.gguf")
    assert done.exit_code == 0 and "run pyinfer-convert place again" in done.stderr
    with open_gguf(tmp_path / "new.gguf") as file:
        entries = read_section(file).entries
    assert sorted(entries) == ["predictors", "profile"]
    np.testing.assert_array_equal(entries["profile"].arrays["counts"], counts)


def test_predictors_are_replaced_also_those_of_powerinfer(made, text, tmp_path):
    """The magic of PowerInfer goes, as its loader would take these predictors for its own."""
    data = bytearray(made("relu_llama")[1].read_bytes())
    data[:4] = b"PWRI"
    model, target = tmp_path / "model.gguf", tmp_path / "new.gguf"
    model.write_bytes(data)
    done = run(model, "--text", text, "--tokens", 2048, "-o", target, "--quant", "q8_0", "--budget", "0.2")
    assert done.exit_code == 0, done.stderr
    assert "belongs to another model" in done.stderr  # its section: the header is not the same
    with open_gguf(target) as file, open_gguf(model) as old:
        assert not file.powerinfer and list(file.tensors) == list(old.tensors)
        assert file.tensors["blk.1.fc2.weight"].type.name == "Q8_0"
        assert file.metadata["pyinfer.activation"] == "relu"


@pytest.mark.parametrize(
    "options, words",
    [
        (["--budget", "0.001"], "the budget is 0.1%; give --budget 0.0"),
        (["--tokens", "300"], "expected at least 8"),
        (["-o", "no/such/folder/x.gguf"], "does not exist; make it first"),
    ],
)
def test_wrong_wishes_are_one_sentence(made, text, tmp_path, options, words):
    target = [] if "-o" in options else ["-o", tmp_path / "new.gguf"]
    done = run(made("relu_llama")[0], "--text", text, "--tokens", 2048, *target, *options)
    assert done.exit_code == 1 and words in done.stderr
    assert sum(line.startswith("error: ") for line in done.stderr.splitlines()) == 1
    assert "Traceback" not in done.stderr and list(tmp_path.iterdir()) == []


def test_wrong_texts_and_models_are_one_sentence(made, text, tmp_path):
    empty, binary = tmp_path / "empty.txt", tmp_path / "binary.txt"
    empty.write_bytes(b"")
    binary.write_bytes(bytes(range(256)) * 20)
    model, predicted, _ = made("relu_llama")
    silu = convert_f32("llama", tmp_path / "silu.gguf")
    target = tmp_path / "new.gguf"
    for arguments, words in (
        ([model, "--text", empty], "the file is empty"),
        ([model, "--text", binary], "is it a binary file?"),
        ([model, "--text", tmp_path / "none.txt"], "cannot be read"),
        ([silu, "--text", text], "silu leaves no neuron at zero"),
        ([tmp_path / "none.gguf", "--text", text], "no such file"),
    ):
        done = run(*arguments, "-o", target)
        assert done.exit_code == 1 and words in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not target.exists()
    assert "exists already" in run(model, "--text", text, "-o", predicted).stderr
    assert "is the file to be read" in run(model, "--text", text, "-o", model, "--force").stderr


def test_wrong_usage(made, text):
    model = made("relu_llama")[0]
    assert run(model).exit_code == 2
    assert run(model, "--text", text, "--form", "relu").exit_code == 2
    assert run(model, "--text", text, "--recall", "1.5").exit_code == 2


@pytest.mark.parametrize("fault", [CapacityError("the disk is full"), KeyboardInterrupt()])
def test_a_file_that_is_not_complete_never_appears(made, text, tmp_path, monkeypatch, fault):
    def fail(*_):
        raise fault

    monkeypatch.setattr(predictor_file, "write_section", fail)
    done = run(made("relu_llama")[0], "--text", text, "--tokens", 2048, "-o", tmp_path / "new.gguf")
    assert done.exit_code == (1 if isinstance(fault, CapacityError) else 130), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_training_without_torch_says_what_to_install(made, text, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "pyinfer_convert.train_predictor", raising=False)
    done = run(made("relu_llama")[0], "--text", text, "-o", tmp_path / "new.gguf", "--train")
    assert done.exit_code == 1 and "pip install 'pyinfer[train]'" in done.stderr


def test_windows_of_one_text_are_divided_once(text, tmp_path, made):
    twin = Path(tmp_path / "twin.txt")
    twin.write_bytes(text.read_bytes())
    with open_gguf(made("relu_llama")[0]) as file:
        tokenizer = Tokenizer.from_metadata(file.metadata)
    one = calibration.read_windows([text], tokenizer, 64, 1 << 20)
    two = calibration.read_windows([text, twin], tokenizer, 64, 1 << 20)
    assert sum(one.tokens.values()) > 2000
    assert {part: list(map(bytes, windows)) for part, windows in one.parts.items()}["fit"][:2] == list(
        map(bytes, two.parts["fit"][:2])
    )
    everything = [bytes(window) for windows in two.parts.values() for window in windows]
    assert len(everything) <= sum(map(len, one.parts.values()))
    assert one.tokens["measure"] == pytest.approx(sum(one.tokens.values()) / calibration.HELD_OUT, rel=0.15)
