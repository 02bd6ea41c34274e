"""Neurons that are computed always: as a dense layer of their own, and what a placement says of them."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
from sparse_files import ZEROING, random_predictors, sparse_gguf
from test_sparsity import BOUND, TOKENS, _shape, _with_predictors, apart, expected_logits, logits, ours  # noqa: F401

from pyinfer.gguf_file import Tensor, open_gguf
from pyinfer.names import GGMLType
from pyinfer.neurons.budget import model_bytes
from pyinfer.neurons.placement import place
from pyinfer.neurons.profile import Profile
from pyinfer.program import sparsity as sparsity_module
from pyinfer.program.sparsity import LayerPlan
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer.runtime.stats import layer_stats
from pyinfer.section import update_section


def _hot_file(path, name: str, quant: str, source: str, share: float = 0.4, extra=None):
    """A file whose predictors have a threshold for some neurons and none for the others, all at random."""
    sparse_gguf(path, name, quant, random_predictors(name), extra=extra)
    random = np.random.default_rng(9)
    thresholds = random.standard_normal(_shape(path)).astype(np.float32)
    thresholds[random.random(thresholds.shape) < share] = -np.inf
    return _with_predictors(path, thresholds, "relu", source)


@pytest.mark.parametrize("name", ZEROING)
@pytest.mark.parametrize("quant", ["f32", "q4_0", "q5_1"])
def test_hot_neurons_apart(name, quant, tmp_path, monkeypatch):
    """As a dense layer of their own they change the order of sums, and nothing else."""
    source = "raw" if name == "falcon_40b_relu" else "norm"
    path = _hot_file(tmp_path / "hot.gguf", name, quant, source)
    together, dense = logits(path, "predicted"), logits(path, "dense")
    monkeypatch.setattr(sparsity_module, "LEAST_HOT", 32)
    with load_model(path, sparsity="predicted") as model:
        assert all(len(plan.hot) >= 32 for plan in model.plan.layers)
        assert ".ffn_gate.weight[hot]" in str(model.program) or ".ffn_up.weight[hot]" in str(model.program)
    found = logits(path, "predicted")
    np.testing.assert_array_equal(found, logits(path, "predicted", threads=3))
    # A last digit decides about a neuron whose score is at its threshold, and how activations are rounded.
    assert apart(found, together) < 0.1 * apart(found, dense)
    if quant == "f32":
        assert apart(found, expected_logits(path, "predicted")) < 10 * BOUND


def test_all_hot_or_few_hot_stay_together():
    for n_hot, expected in ((0, 0), (255, 0), (256, 256), (300, 288), (511, 480), (512, 0)):
        thresholds = np.zeros(512, np.float32)
        thresholds[512 - n_hot :] = -np.inf
        plan = LayerPlan("predicted", thresholds=thresholds, apart=True)
        assert len(plan.hot) == expected
        assert not len(replace(plan, apart=False).hot)


@pytest.mark.parametrize("size", [48, 96, 192])
def test_a_bias_of_the_predictor_is_checked_before_it_is_cut(size, tmp_path, monkeypatch):
    """Of a wrong size it costs the predictors, with a sentence, and of the right one nothing."""
    monkeypatch.setattr(sparsity_module, "LEAST_HOT", 32)
    bias = np.random.default_rng(1).standard_normal(size).astype(np.float32)
    path = _hot_file(tmp_path / "m.gguf", "relu_llama", "f32", "norm", extra={"blk.0.fc2.bias": bias})
    assert _shape(path)[1] == 96
    with load_model(path, sparsity="predicted") as model:
        assert model.plan.modes == ({"predicted"} if size == 96 else {"exact"})
        assert len(model.notices) == (size != 96)
    if size == 96:
        assert apart(logits(path, "predicted"), expected_logits(path, "predicted")) < 10 * BOUND


def test_parts_of_tensors():
    random = np.random.default_rng(0)
    values, index = random.standard_normal((96, 64)).astype(np.float32), np.array([5, 3, 95])
    for shape, rows in (
        ((64, 96), values),
        ((64, 96, 1), values),
        ((96,), values[:, 0]),
        ((96, 1), values[:, 1]),
    ):
        rows = np.ascontiguousarray(rows)
        whole = Tensor("w", shape, GGMLType.F32, rows.view(np.uint8).reshape(-1))
        part = whole.part("hot", index)
        assert part.name == "w[hot]" and part.whole is whole
        assert part.shape == (*((64,) if rows.ndim == 2 else ()), 3)
        np.testing.assert_array_equal(part.data.view(np.float32), rows[index].reshape(-1))
        assert part.nbytes == part.data.size and whole.nbytes == rows.nbytes
    quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q4_0)
    whole = Tensor("w", (64, 96), GGMLType.Q4_0, quantized.view(np.uint8).reshape(-1))
    np.testing.assert_array_equal(whole.part("hot", index).data, quantized[index].reshape(-1))


def test_bytes_skipped_count_hot_neurons_as_they_are_read(tmp_path, monkeypatch):
    """All that is read of a gated layer, added up by hand."""
    path = _hot_file(tmp_path / "m.gguf", "relu_llama", "f32", "norm")
    monkeypatch.setattr(sparsity_module, "LEAST_HOT", 32)
    with load_model(path, sparsity="predicted", observe="stats") as model:
        session = Session(model, 64, 2)
        for token in TOKENS[:10]:
            session.step([token], [0])
        for layer, each in enumerate(layer_stats(session)):
            n_hot, neurons = len(model.plan.layers[layer].hot), _shape(path)[1]
            rows = {what: session.observed(what, layer).sum() / 10 for what in ("computed", "used", "hot")}
            row = 1 / (3 * neurons)  # of the layer's bytes
            tensors = [model.file.tensors[f"blk.{layer}.{name}.weight"] for name in ("fc1", "fc2", "ffn_up")]
            fc1, fc2, up = (tensor.nbytes for tensor in tensors)
            read = 2 * n_hot * row + rows["hot"] * row + (rows["computed"] + 2 * rows["used"]) * row
            read += (fc1 + fc2 * (neurons - n_hot) / neurons) / (3 * up)
            assert each.skipped == pytest.approx(1 - read)
        session.close()


@pytest.mark.parametrize("with_profile", [True, False])
def test_a_placement_for_a_gpu_is_replaced_at_load(ours, with_profile):  # noqa: F811
    """With one sentence, by what the profile says, as there is no GPU."""
    layers, neurons = _shape(ours)
    _with_predictors(ours, np.full((layers, neurons), 1e30))
    counts = np.zeros((layers, neurons), np.int64)
    counts[:, 5:40], counts[:, 40:] = 60, 20
    with open_gguf(ours) as file:
        sizes = model_bytes(file, 64)
    budget = sum(sum(part.values()) for _, part in sizes.parts()) + 70 * max(sizes.neuron)
    placed, _ = place(counts, sizes, budget, None, "greedy")
    assert placed.processor == "gpu" and placed.hot.any()
    entries = {"placement": placed.to_entry()}
    if with_profile:
        entries["profile"] = Profile(counts, 100, [], None, "relu").to_entry()
    update_section(ours, **entries)
    with load_model(ours, sparsity="predicted") as model:
        hot = [int(np.isneginf(each.thresholds).sum()) for each in model.plan.layers]
        (notice,) = model.notices
    assert "of GPU memory, there is none" in notice and "ours.gguf" in notice
    assert hot == [32 if with_profile else 0] * layers


def test_a_placement_with_an_impossible_context_is_left_out(ours):  # noqa: F811
    layers, neurons = _shape(ours)
    _with_predictors(ours, np.full((layers, neurons), 1e30))
    with open_gguf(ours) as file:
        placed, _ = place(
            np.ones((layers, neurons), np.int64), model_bytes(file, 64), 1 << 20, None, "greedy"
        )
    update_section(ours, placement=replace(placed, n_ctx=1 << 40).to_entry())
    with load_model(ours, sparsity="predicted") as model:
        (notice,) = model.notices
        assert "n_ctx is 1099511627776" in notice and model.plan.modes == {"predicted"}
