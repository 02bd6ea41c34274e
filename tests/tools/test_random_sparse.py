"""Sparse random models: how often neurons fire, what predictors find: by gguf and NumPy, and at run time."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
from click.testing import CliRunner

from pyinfer.gguf_file import open_gguf
from pyinfer.neurons.predictor import Predictors
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer.section import read_section
from pyinfer_convert.cli import main as convert
from pyinfer_tools.random_sparse import SHAPES, main, shares, write_random_sparse

TINY = SHAPES["tiny"]
DUAL = replace(TINY, architecture="bamboo", inactive=0.9)
N_LAYERS, N_NEURONS = TINY.dense.layers, TINY.dense.feed_forward


@pytest.fixture(
    scope="module", params=[(TINY, "q4_0"), (DUAL, "q4_0"), (TINY, "f16")], ids=["llama", "bamboo", "f16"]
)
def written(request, tmp_path_factory):
    """(shape, path, quality that was returned)"""
    shape, quant = request.param
    path = tmp_path_factory.mktemp("sparse") / "model.gguf"
    return shape, path, write_random_sparse(path, shape, quant)


@pytest.fixture(scope="module")
def matrices(written):
    """float64 by name, of gguf's own reader."""
    return {
        tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        for tensor in gguf.GGUFReader(written[1]).tensors
    }


@pytest.fixture(scope="module")
def x(matrices):
    """The embedding of every token of the vocabulary, normed."""
    rows = matrices["token_embd.weight"]
    return rows / np.sqrt((rows**2).mean(1, keepdims=True))


@pytest.mark.parametrize("mean", [0.03, 0.11, 0.3])
def test_a_quarter_of_the_neurons_causes_most_activations(mean):
    found = shares(4096, mean)
    assert found.mean() == pytest.approx(mean, rel=1e-3)
    assert found[:1024].sum() / found.sum() == pytest.approx(0.8, abs=0.01)
    assert (np.diff(found) <= 0).all() and 0 < found[-1] < found[0] <= 0.98


def test_neurons_fire_rarely_and_unevenly(written, matrices, x):
    shape, _, quality = written
    for layer in range(N_LAYERS):
        gate, up = (x @ matrices[f"blk.{layer}.ffn_{part}.weight"].T for part in ("gate", "up"))
        fired = (gate > 0) & (up > 0) if shape.dual else gate > 0
        assert fired.mean() == pytest.approx(1 - shape.inactive, abs=0.01)
        assert (gate > 0).mean() == pytest.approx(quality.fired, abs=0.01)
        often = np.sort((gate > 0).mean(0))[::-1]
        assert often[: len(often) // 4].sum() / often.sum() == pytest.approx(0.8, abs=0.04)
        assert (often > 0.5).mean() == pytest.approx(0.06, abs=0.02)


def test_predictors_find_what_fires(written, matrices, x):
    """In the file's own order of neurons, for all tokens of the vocabulary; hot ones are always computed."""
    _, path, quality = written
    with open_gguf(path) as file:
        entry = read_section(file).entries["predictors"]
    thresholds = Predictors.from_entry(entry, N_LAYERS, N_NEURONS).thresholds
    for layer in range(N_LAYERS):
        fc1, fc2, gate = (matrices[f"blk.{layer}.{part}.weight"] for part in ("fc1", "fc2", "ffn_gate"))
        predicted, fired = np.maximum(x @ fc1.T, 0) @ fc2.T >= thresholds[layer], x @ gate.T > 0
        assert (predicted & fired).sum() / fired.sum() == pytest.approx(0.99, abs=0.004)
        assert (predicted & fired).sum() / predicted.sum() == pytest.approx(quality.precision, abs=0.02)
        assert predicted.mean() < 1.3 * fired.mean()
        hot = np.isneginf(thresholds[layer])
        assert fired[:, hot].mean(0).min() > 0.4 and fired[:, ~hot].mean(0).max() < 0.6


def test_layers_differ(matrices):
    first, second = (matrices[f"blk.{layer}.ffn_gate.weight"] for layer in (0, 1))
    assert not np.array_equal(first, second)
    assert np.array_equal(np.unique(first, axis=0), np.unique(second, axis=0))
    assert not np.array_equal(matrices["blk.0.ffn_up.weight"], matrices["blk.1.ffn_up.weight"])


def test_nothing_writes_to_the_constant_elements(matrices):
    assert (matrices["token_embd.weight"][:, :32] == 1).all()
    for layer in range(N_LAYERS):
        assert not matrices[f"blk.{layer}.ffn_down_t.weight"][:, :32].any()
        assert not matrices[f"blk.{layer}.attn_output.weight"][:32].any()


def test_the_section_says_how_good_predictors_are(written):
    shape, path, quality = written
    with open_gguf(path) as file:
        section = read_section(file)
        assert file.metadata["powerinfer.sparse_threshold"] == np.float32(quality.threshold)
    found = Predictors.from_entry(section.entries["predictors"], N_LAYERS, N_NEURONS)
    assert found.layers == (quality,) * N_LAYERS and quality.rank == shape.rank
    hot = np.isneginf(found.thresholds)
    assert (found.thresholds[~hot] == np.float32(quality.threshold)).all()
    assert hot.mean(1) == pytest.approx([0.06] * N_LAYERS, abs=0.02)


def test_exact_equals_dense_and_predicted_is_close(written):
    logits = {mode: _logits(written[1], mode) for mode in ("dense", "exact", "predicted")}
    size = np.abs(logits["dense"]).max()
    assert np.abs(logits["exact"] - logits["dense"]).max() < 1e-4 * size
    assert 0 < np.abs(logits["predicted"] - logits["dense"]).max() < 0.02 * size


def test_the_runtime_computes_what_is_predicted(written):
    _, path, quality = written
    with load_model(path, sparsity="predicted", observe="stats") as model:
        session = Session(model, 8, 2, 16)
        for _ in range(8):
            session.step(np.random.default_rng(3).permutation(512)[:16], range(16))
        for layer in range(N_LAYERS):
            seen = {what: session.observed(what, layer).sum() for what in ("computed", "used", "truth")}
            assert seen["used"] / seen["truth"] > 0.98
            assert seen["computed"] / (8 * 16 * N_NEURONS) == pytest.approx(quality.predicted, abs=0.01)
        session.close()


def test_activations_neither_explode_nor_vanish(tmp_path):
    deep = replace(TINY, dense=replace(TINY.dense, layers=32))
    write_random_sparse(tmp_path / "deep.gguf", deep, "q4_0")
    with load_model(tmp_path / "deep.gguf", observe="rows") as model:
        session = Session(model, 64, 2)
        session.prefill(np.random.default_rng(4).integers(0, 512, 64))
        for layer in (0, 31):
            assert session.observed("raw", layer).std() == pytest.approx(1, abs=0.05)
            assert (session.observed("hidden", layer) != 0).mean() == pytest.approx(0.11, abs=0.015)
        session.close()


@pytest.mark.parametrize("shape", [TINY, DUAL], ids=["llama", "bamboo"])
def test_powerinfer_gets_its_own_file(tmp_path, shape):
    """There predictors read the residual before its norm, and the metadata has the only threshold."""
    plain, theirs = tmp_path / "plain.gguf", tmp_path / "theirs.gguf"
    write_random_sparse(plain, shape, "q4_0")
    arguments = [str(plain), "-o", str(theirs), "--quant", "q4_0", "--format", "powerinfer"]
    found = CliRunner().invoke(convert, arguments)
    assert found.exit_code == 0, found.stderr
    assert theirs.read_bytes()[:4] == b"PWRI"
    np.testing.assert_allclose(_logits(theirs, "predicted"), _logits(plain, "predicted"), atol=0.02)


def test_command(tmp_path):
    path = tmp_path / "model.gguf"
    arguments = ["--shape", "tiny", "--layers", "1", "--rank", "192", "--inactive", "0.8", "-o", str(path)]
    assert CliRunner().invoke(main, arguments).exit_code == 0
    shapes = {tensor.name: tensor.shape.tolist() for tensor in gguf.GGUFReader(path).tensors}
    assert shapes["blk.0.fc1.weight"] == [256, 192] and shapes["blk.0.fc2.weight"] == [192, 512]
    assert shapes["blk.0.ffn_down_t.weight"] == [256, 512] and "blk.1.fc1.weight" not in shapes
    before = path.read_bytes()
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 1 and "exists already" in again.stderr
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.gguf"]
    odd = CliRunner().invoke(main, ["--rank", "200", "-o", str(tmp_path / "other.gguf")])
    assert odd.exit_code == 2 and "multiple of 64" in odd.stderr


def _logits(path, sparsity):
    with load_model(path, sparsity=sparsity) as model:
        session = Session(model, 8, 2)
        logits = [session.step([token], [0])[0] for token in (5, 300, 77, 12)]
        session.close()
    return np.array(logits)
