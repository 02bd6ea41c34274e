"""PowerInfer's predictors and files: what is written is what its loader wants, and is read back."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gguf
import numpy as np
import pytest
from checkpoint_files import torch_file
from click.testing import CliRunner
from hf_checkpoints import golden_logits

from pyinfer.gguf_file import open_gguf
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer_convert import cli

HF = Path(__file__).parents[1] / "golden" / "hf"
HIDDEN = 32


def shape_of(name: str) -> tuple[int, int, int]:
    """Layers, embedding and neurons of a tiny checkpoint."""
    config = json.loads((HF / name / "config.json").read_text(encoding="utf-8"))
    keys = ("intermediate_size", "ffn_dim", "ffn_hidden_size")
    neurons = next(config[key] for key in keys if key in config)
    return config["num_hidden_layers"], config["hidden_size"], neurons


@pytest.fixture
def predictors(tmp_path):
    """predictors(name, layers=None, **config) -> a folder like PowerInfer's, and its matrices."""

    def make(name: str, layers: int | None = None, **config):
        found, embedding, neurons = shape_of(name)
        random, folder = np.random.default_rng(3), tmp_path / "predictors"
        folder.mkdir(exist_ok=True)
        matrices = {}
        for layer in range(layers or found):
            fc1 = random.standard_normal((HIDDEN, embedding)).astype(np.float16)
            fc2 = random.standard_normal((neurons, HIDDEN)).astype(np.float16)
            (folder / f"model_{layer}.pt").write_bytes(torch_file({"fc1.weight": fc1, "fc2.weight": fc2}))
            matrices[layer] = fc1, fc2
        if config:
            (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
        return folder, matrices

    return make


def convert(*arguments):
    return CliRunner().invoke(cli.main, [str(each) for each in arguments])


@pytest.mark.parametrize("name", ["relu_llama", "bamboo", "falcon_40b_relu", "opt"])
def test_a_file_for_powerinfer(name, predictors, tmp_path):
    """Magic, threshold, predictors and down matrices by the gguf package; and our engine runs it."""
    folder, matrices = predictors(name, sparse_threshold=0.25)
    out = tmp_path / "out.powerinfer.gguf"
    done = convert(HF / name, "-o", out, "--quant", "f16", "--format", "powerinfer", "--predictor", folder)
    assert done.exit_code == 0, done.stderr
    data = out.read_bytes()
    assert data[:4] == b"PWRI"
    (tmp_path / "plain.gguf").write_bytes(b"GGUF" + data[4:])
    reader = gguf.GGUFReader(tmp_path / "plain.gguf")
    assert reader.fields["powerinfer.sparse_threshold"].contents() == 0.25
    tensors = {each.name: each for each in reader.tensors}
    layers, embedding, neurons = shape_of(name)
    for layer in range(layers):
        assert list(tensors[f"blk.{layer}.ffn_down_t.weight"].shape) == [embedding, neurons]
        for part, expected in zip(("fc1", "fc2"), matrices[layer]):
            np.testing.assert_array_equal(tensors[f"blk.{layer}.{part}.weight"].data, expected)
    assert f"blk.{layers}.fc1.weight" not in tensors
    tokens, logits = golden_logits(name)
    with load_model(out) as model:
        session = Session(model, 64, 2)
        found = session.prefill(tokens, all_logits=True)
        session.close()
    assert np.abs(found - logits).max() <= 5e-3 * np.abs(logits).max()


def test_layers_are_taken_by_number(tmp_path):
    """10 comes behind 9: sorted as texts, layer 2 would get the predictor of layer 10."""
    from pyinfer_convert.powerinfer import Predictors

    for layer in range(12):
        fc1 = np.full((4, 8), layer, np.float32)
        (tmp_path / f"model_{layer}.pt").write_bytes(
            torch_file({"fc1.weight": fc1, "fc2.weight": np.zeros((16, 4), np.float32)})
        )
    opened = Predictors(tmp_path)
    for tensor in opened.tensors(8, 16)[::2]:
        assert (tensor.load(slice(0, 4)) == int(tensor.name.split(".")[1])).all()
    opened.close()


def test_a_gguf_gets_predictors_later(predictors, tmp_path):
    folder, matrices = predictors("relu_llama")
    first, second = tmp_path / "first.gguf", tmp_path / "second.gguf"
    assert convert(HF / "relu_llama", "-o", first, "--quant", "f32").exit_code == 0
    done = convert(first, "-o", second, "--quant", "q4_0", "--predictor", folder, "--predictor-quant", "f16")
    assert done.exit_code == 0, done.stderr
    with open_gguf(second) as file:
        assert not file.powerinfer
        stored = file.tensors["blk.1.fc2.weight"].data.view(np.float16).reshape(matrices[1][1].shape)
        np.testing.assert_array_equal(stored, matrices[1][1])


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("relu_llama", "--quant", "q8_0", "--format", "powerinfer"), "f16 and q4_0, not in q8_0"),
        (
            ("nemotron", "--quant", "f16", "--format", "powerinfer"),
            "PowerInfer knows bamboo, falcon, llama, opt, not nemotron",
        ),
        (("relu_llama", "--quant", "f16", "--format", "powerinfer"), "--predictor"),
        (("llama", "--quant", "f16", "--format", "powerinfer"), "ffn_down_t.weight is missing"),
    ],
)
def test_what_powerinfer_cannot_run_is_refused(arguments, complaint, tmp_path):
    done = convert(HF / arguments[0], "-o", tmp_path / "out.gguf", *arguments[1:])
    assert done.exit_code == 1 and complaint in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_predictors_that_do_not_fit(predictors, tmp_path):
    folder, _ = predictors("relu_llama")
    target = ("-o", tmp_path / "out.gguf", "--predictor", folder)
    (folder / "model_1.pt").rename(folder / "model_7.pt")
    assert "without gaps" in convert(HF / "relu_llama", *target).stderr
    (folder / "model_7.pt").unlink()
    done = convert(HF / "relu_llama", *target)
    assert done.exit_code == 1 and "predictors of 1 layers, the model has" in done.stderr
    predictors("relu_llama")
    odd = {"fc1.weight": np.zeros((4, 8), np.float32), "fc2.weight": np.zeros((16, 5), np.float32)}
    (folder / "model_0.pt").write_bytes(torch_file(odd))
    assert "expected fc1.weight [hidden, embedding]" in convert(HF / "relu_llama", *target).stderr
    odd["fc2.weight"] = np.zeros((16, 4), np.float32)
    (folder / "model_0.pt").write_bytes(torch_file(odd))
    assert "the model needs" in convert(HF / "relu_llama", *target).stderr
    assert "no such folder" in convert(HF / "relu_llama", "--predictor", tmp_path / "nowhere").stderr
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize("text", ["[1]", "{", '{"sparse_threshold": "low"}', '{"sparse_threshold": NaN}'])
def test_a_bad_predictor_configuration(text, predictors, tmp_path):
    folder, _ = predictors("relu_llama")
    (folder / "config.json").write_text(text, encoding="utf-8")
    done = convert(HF / "relu_llama", "-o", tmp_path / "out.gguf", "--predictor", folder)
    assert done.exit_code == 1 and "config.json" in done.stderr


def test_a_published_file_keeps_its_activation(predictors, tmp_path):
    """Only the magic says that such a file is ReLU: as a plain GGUF it must say so itself."""
    folder, _ = predictors("relu_llama")
    own, published, out = (tmp_path / name for name in ("own.gguf", "published.gguf", "out.gguf"))
    arguments = ("--quant", "f16", "--format", "powerinfer", "--predictor", folder)
    assert convert(HF / "relu_llama", "-o", own, *arguments).exit_code == 0
    data = own.read_bytes()
    assert data.count(b"pyinfer.activation") == 1
    published.write_bytes(data.replace(b"pyinfer.activation", b"another.activation"))
    assert convert(published, "-o", out, "--quant", "f16").exit_code == 0
    tokens, logits = golden_logits("relu_llama")
    for path in (published, out):
        with load_model(path) as model:
            session = Session(model, 64, 2)
            found = session.prefill(tokens, all_logits=True)
            session.close()
        assert np.abs(found - logits).max() <= 5e-3 * np.abs(logits).max()


@pytest.mark.parametrize(
    ("name", "extra", "complaint"),
    [
        ("prosparse_llama", (), "fatrelu:0.01, PowerInfer would compute plain ReLU"),
        ("relu_llama", ("--predictor-quant", "q8_0"), "fc1.weight would be Q8_0"),
    ],
)
def test_what_powerinfer_would_compute_otherwise_is_refused(name, extra, complaint, predictors, tmp_path):
    folder, _ = predictors(name)
    arguments = ("--quant", "f16", "--format", "powerinfer", "--predictor", folder, *extra)
    done = convert(HF / name, "-o", tmp_path / "out.gguf", *arguments)
    assert done.exit_code == 1 and complaint in done.stderr


@pytest.mark.parametrize("file", ["model.safetensors", "config.json"])
def test_a_checkpoint_is_not_overwritten_with_force(file, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(HF / "llama", folder)
    before = (folder / file).read_bytes()
    done = convert(folder, "-o", folder / file, "--force")
    assert done.exit_code == 1 and "is the file to be read" in done.stderr
    assert (folder / file).read_bytes() == before
