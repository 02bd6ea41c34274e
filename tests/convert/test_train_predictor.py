"""Training predictors with torch: rounding as the file's, better than the closed form, both forms."""

from __future__ import annotations

import random

import gguf
import numpy as np
import pytest
from click.testing import CliRunner
from hf_checkpoints import convert_f32

torch = pytest.importorskip("torch", reason="the extra [train]; test_cli_predict.py needs none")

from pyinfer.gguf_file import open_gguf  # noqa: E402
from pyinfer.names import GGMLType  # noqa: E402
from pyinfer.neurons.low_rank import Gate, level_at_recall, moments  # noqa: E402
from pyinfer.neurons.predictor import Predictors  # noqa: E402
from pyinfer.runtime.loader import load_model  # noqa: E402
from pyinfer.section import read_section  # noqa: E402
from pyinfer_convert import cli  # noqa: E402
from pyinfer_convert.train_predictor import _begin, rounded, train  # noqa: E402

WIDTH, NEURONS = 32, 64


def rows(n, seed=0):
    """Inputs, and firings that depend on two directions more than on others."""
    draw = np.random.default_rng(seed)
    x = draw.standard_normal((n, WIDTH)).astype(np.float32)
    weight = np.random.default_rng(9).standard_normal((NEURONS, WIDTH)).astype(np.float32)
    gate = Gate(weight, np.full(NEURONS, -4, np.float32))
    return x, gate, gate.margin(x) > 0


def predicted_share(fc1, fc2, form, x, fired):
    small = x @ fc1.T
    score = (np.maximum(small, 0) if form == "relu" else small) @ fc2.T
    return float((score >= level_at_recall(score, fired, 0.9)).mean())


@pytest.mark.parametrize("type_", [GGMLType.Q4_0, GGMLType.Q8_0])
def test_weights_are_rounded_as_the_file_rounds_them(type_):
    weight = np.random.default_rng(0).standard_normal((40, 96)).astype(np.float32)
    weight[3, 32:64] = 0
    kind = gguf.GGMLQuantizationType(type_)
    expected = gguf.quants.dequantize(gguf.quants.quantize(weight, kind), kind)
    parameter = torch.nn.Parameter(torch.from_numpy(weight))
    found = rounded(parameter, type_)
    step = np.abs(weight).max() / (8 if type_ == GGMLType.Q4_0 else 127)
    # the file's scales are halves, and a tie may fall to the other side
    assert np.mean(np.abs(found.detach().numpy() - expected) > 0.1 * step) < 0.01
    assert np.abs(found.detach().numpy() - expected).max() < 1.1 * step
    found.sum().backward()
    assert (parameter.grad == 1).all()


def test_training_predicts_fewer_neurons_than_the_closed_form():
    x, gate, fired = rows(6000)
    found = moments(lambda: iter([(x, fired)]), gate).fit(WIDTH)
    told = []
    fc1, fc2 = train(
        found,
        8,
        lambda: iter([(x, fired)]),
        form="linear",
        type_=GGMLType.F16,
        recall=0.9,
        epochs=4,
        progress=lambda done, total: told.append((done, total)),
    )
    assert fc1.shape == (8, WIDTH) and fc2.shape == (NEURONS, 8) and told[-1][0] == told[-1][1]
    x, _, fired = rows(3000, seed=1)
    closed = found.first(8)
    before = predicted_share(closed, found.second(closed), "linear", x, fired)
    assert predicted_share(fc1, fc2, "linear", x, fired) < before


def test_relu_begins_as_the_linear_form_of_half_its_rank():
    x, gate, fired = rows(4000)
    found = moments(lambda: iter([(x, fired)]), gate).fit(WIDTH)
    model = _begin(found, 16, lambda: iter([(x, fired)]), "relu", GGMLType.F16)
    linear = _begin(found, 8, lambda: iter([(x, fired)]), "linear", GGMLType.F16)
    with torch.no_grad():
        given = torch.from_numpy(x)
        both = np.corrcoef(model(given).numpy().ravel(), linear(given).numpy().ravel())[0, 1]
    assert both > 0.99


def test_the_command_trains_and_the_model_runs(tmp_path):
    draw, words = random.Random(0), ["cat", "sat", "on", "mat", "dog", "ran", "to", "it", "birds"]
    text = tmp_path / "text.txt"
    text.write_text("".join(draw.choice(words) + draw.choice("  .\n") for _ in range(2000)), encoding="utf-8")
    model, target = convert_f32("relu_llama", tmp_path / "model.gguf"), tmp_path / "new.gguf"
    arguments = [
        str(model),
        "--text",
        str(text),
        "-o",
        str(target),
        "--train",
        "--form",
        "relu",
        "--tokens",
        "2048",
    ]
    done = CliRunner().invoke(cli.main, ["predict", *arguments])
    assert done.exit_code == 0, done.stderr
    with open_gguf(target) as file:
        found = Predictors.from_entry(read_section(file).entries["predictors"], 2, 96)
    assert [each.form for each in found.layers] == ["relu", "relu"]
    assert all(each.recall > 0.97 and each.predicted < 1 for each in found.layers)
    with load_model(target, sparsity="predicted") as loaded:
        assert {layer.form for layer in loaded.plan.layers} == {"relu"}
