"""Sparse execution of whole models, and the decision which of its ways a model goes."""

from __future__ import annotations

import numpy as np
import pytest
from golden_files import dequantize
from hypothesis import given, settings
from hypothesis import strategies as st
from sparse_files import ZEROING, random_predictors, sparse_gguf

from pyinfer import names
from pyinfer.cpu.lowering import MOST_BY_ROWS
from pyinfer.errors import InputError
from pyinfer.gguf_file import open_gguf
from pyinfer.models import build_program
from pyinfer.neurons.predictor import PredictorQuality, Predictors
from pyinfer.neurons.profile import Profile
from pyinfer.neurons.sparsity import parse_sparsity
from pyinfer.program import sparsity as sparsity_module
from pyinfer.program.reference import Reference
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session
from pyinfer.runtime.stats import layer_stats
from pyinfer.section import update_section

TOKENS = np.random.default_rng(3).integers(3, 60, 44)
BOUND = 1e-4  # of the largest logit; found 2e-6
POWERINFER = {names.POWERINFER_SPARSE_THRESHOLD: 0.25}


def logits(path, sparsity: str, threads: int = 2, observe: str | None = None) -> np.ndarray:
    """Many rows, one row four times, several rows, three sequences at once: every way that rows can go."""
    with load_model(path, sparsity=sparsity, observe=observe) as model:
        session = Session(model, 64, threads, n_sequences=3)
        try:
            parts = [session.prefill(TOKENS[:20], all_logits=True)]
            parts += [session.step([token], [0]) for token in TOKENS[20:24]]
            parts.append(session.prefill(TOKENS[24:31], all_logits=True))
            for sequence in (1, 2):
                session.prefill(TOKENS[31:34], sequence)
            parts.append(session.step(TOKENS[34:37], [0, 2, 1]))
            return np.concatenate(parts)
        finally:
            session.close()


def expected_logits(path, sparsity: str) -> np.ndarray:
    """The same steps by the reference executor."""
    with load_model(path, sparsity=sparsity) as model:
        reference = Reference(model.program, dequantize)

        def run(tokens, start: int, sequence: int) -> np.ndarray:
            n = len(tokens)
            reference.guesses = n <= MOST_BY_ROWS
            return reference.step(tokens, np.arange(start, start + n), np.full(n, sequence), np.arange(n))

        parts = [run(TOKENS[:20], 0, 0)]
        parts += [run(TOKENS[n : n + 1], n, 0) for n in range(20, 24)]
        parts.append(run(TOKENS[24:31], 24, 0))
        for sequence in (1, 2):
            run(TOKENS[31:34], 0, sequence)
        positions, sequences = np.array([31, 3, 3]), np.array([0, 2, 1])
        return np.concatenate([*parts, reference.step(TOKENS[34:37], positions, sequences, np.arange(3))])


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.fixture(scope="module")
def file_of(tmp_path_factory):
    made = {}

    def make(name: str, quant: str = "f32"):
        if (name, quant) not in made:
            path = tmp_path_factory.mktemp("sparse") / f"{name}-{quant}.gguf"
            made[name, quant] = sparse_gguf(path, name, quant, random_predictors(name), POWERINFER)
        return made[name, quant]

    return make


@pytest.mark.parametrize("name", ZEROING)
@pytest.mark.parametrize("quant", ["f32", "q8_0", "q4_0"])
def test_exact_equals_dense(name, quant, file_of):
    """To the bit, for one row, few and many, several sequences, and any number of threads."""
    path = file_of(name, quant)
    dense = logits(path, "dense")
    assert np.isfinite(dense).all() and dense.std() > 0
    np.testing.assert_array_equal(logits(path, "exact", threads=3), dense)


@pytest.mark.parametrize("name", ZEROING)
def test_predicted_equals_the_reference(name, file_of):
    """PowerInfer's predictors: their form, their input before the norm (Falcon: of the layer), the key."""
    path = file_of(name)
    found = logits(path, "predicted")
    assert apart(found, expected_logits(path, "predicted")) < BOUND
    assert apart(found, logits(path, "dense")) > 1e-2, "random predictors must leave neurons out"


def test_files_of_powerinfer_run_predicted_by_themselves(file_of):
    path = file_of("relu_llama")
    np.testing.assert_array_equal(logits(path, "auto"), logits(path, "predicted"))


def test_a_file_with_powerinfers_magic(tmp_path):
    """Without a threshold in it PowerInfer's is 0."""
    path = sparse_gguf(tmp_path / "model.gguf", "relu_llama", "q8_0", random_predictors("relu_llama"))
    path.write_bytes(names.MAGIC_POWERINFER + path.read_bytes()[4:])
    with load_model(path) as model:
        assert model.plan.modes == {"predicted"} and not model.notices
        assert all((each.thresholds == 0).all() and each.input == "raw" for each in model.plan.layers)


def test_without_predictors_exact_is_the_way(tmp_path):
    path = sparse_gguf(tmp_path / "model.gguf", "relu_llama")
    with load_model(path) as model:
        assert model.plan.modes == {"exact"} and not model.notices
    with pytest.raises(InputError, match=r"has no predictors.*pyinfer-convert predict"):
        load_model(path, sparsity="predicted")


def _with_predictors(path, thresholds, form: str = "linear", source: str = "norm", **changes):
    shape = thresholds.shape
    quality = {
        "threshold": 0.0,
        "recall": 0.99,
        "precision": 0.8,
        "predicted": 0.5,
        "fired": 0.4,
        "tokens": 9,
    }
    rank = changes.pop("rank", 32)
    layers = tuple(PredictorQuality(rank, form, source, **{**quality, **changes}) for _ in range(shape[0]))
    update_section(path, predictors=Predictors(layers, thresholds.astype(np.float32)).to_entry())
    return path


def _shape(path) -> tuple[int, int]:
    with open_gguf(path) as file:
        return build_program(file)[0].block_count, file.tensors["blk.0.ffn_up.weight"].rows


@pytest.fixture()
def ours(tmp_path):
    """A model with predictors of ours, as `pyinfer-convert predict` writes them."""
    return sparse_gguf(tmp_path / "ours.gguf", "relu_llama", "f32", random_predictors("relu_llama"))


def test_linear_predictors_of_the_normed_input(ours):
    random = np.random.default_rng(5)
    _with_predictors(ours, random.standard_normal(_shape(ours)))
    found, expected = logits(ours, "predicted"), expected_logits(ours, "predicted")
    assert apart(found, expected) < BOUND
    assert apart(found, logits(ours, "dense")) > 1e-2


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_hot_neurons_need_no_prediction(ours, share):
    """Thresholds of -inf: computed always. With all of them hot the result is the exact one."""
    shape = _shape(ours)
    thresholds = np.where(np.random.default_rng(6).random(shape) < share, -np.inf, 1e30)
    _with_predictors(ours, thresholds)
    found = logits(ours, "predicted")
    if share == 1.0:
        np.testing.assert_array_equal(found, logits(ours, "exact"))
    else:
        assert apart(found, expected_logits(ours, "predicted")) < BOUND


def test_a_profile_makes_neurons_hot(ours):
    """Those that fire for at least half of the tokens, in whole panels of 16."""
    layers, neurons = _shape(ours)
    _with_predictors(ours, np.full((layers, neurons), 1e30))
    counts = np.zeros((layers, neurons), np.int64)
    counts[:, 5:40] = 60
    profile = Profile(counts, 100, [], None, "relu")
    update_section(ours, profile=profile.to_entry())
    with load_model(ours, sparsity="predicted") as model:
        hot = [int(np.isneginf(each.thresholds).sum()) for each in model.plan.layers]
    assert hot == [32] * layers


@pytest.mark.parametrize("name", ["llama", "falcon_7b", "relu_llama"])
def test_thresholded(name, tmp_path):
    """CATS: what the histogram says is below the share counts as zero, in every kind of step."""
    path = sparse_gguf(tmp_path / "model.gguf", name)
    layers, neurons = _shape(path)
    with load_model(path, sparsity="dense", observe="histogram") as model:
        session = Session(model, 64, 2)
        session.prefill(TOKENS)
        bins = np.stack([session.observed("histogram", layer) for layer in range(layers)])
        session.close()
    profile = Profile(np.zeros((layers, neurons), np.int64), len(TOKENS), [], bins, "silu")
    update_section(path, profile=profile.to_entry())
    if name == "relu_llama":  # half of it is zero anyway
        np.testing.assert_array_equal(logits(path, "cats=0.2"), logits(path, "exact"))
    found = logits(path, "cats=0.7")
    assert apart(found, expected_logits(path, "cats=0.7")) < BOUND
    assert apart(found, logits(path, "dense")) > 1e-3
    with load_model(path, sparsity="cats=0.7", observe="stats") as model:
        session = Session(model, 64, 2)
        for token in TOKENS[:30]:
            session.step([token], [0])
        stats = layer_stats(session)
        session.close()
    assert all(each.mode == "exact" and 0.15 < each.fired < 0.45 for each in stats)


@pytest.mark.parametrize("least_hot", [32, 256])
def test_statistics_count_what_the_reference_counts(ours, least_hot, monkeypatch):
    monkeypatch.setattr(sparsity_module, "LEAST_HOT", least_hot)
    random = np.random.default_rng(8)
    layers, neurons = _shape(ours)
    thresholds = random.standard_normal((layers, neurons))
    thresholds[:, :32] = -np.inf
    _with_predictors(ours, thresholds)
    with load_model(ours, sparsity="predicted", observe="stats") as model:
        session = Session(model, 64, 2, n_sequences=3)
        session.prefill(TOKENS[:20])  # many rows: nothing is skipped, nothing is counted
        with pytest.raises(InputError, match="nothing was counted yet"):
            layer_stats(session)
        session.prefill(TOKENS[:9], 1)
        session.step([7], [2])
        stats = layer_stats(session)
        session.close()
        reference = Reference(model.program, dequantize)
        reference.step(TOKENS[:9], np.arange(9), np.full(9, 1), [0])
        reference.step([7], [0], [2], [0])
    for layer, each in enumerate(stats):
        seen = {
            what: sum((rows != 0).sum() for rows in reference.observed[what, layer])
            for what in ("computed", "truth", "used")
        }
        if least_hot == 32:
            hot = sum((rows != 0).sum() for rows in reference.observed["hot", layer])
            seen = {what: number + hot for what, number in seen.items()}
            seen["computed"] += 10 * 32 - hot
        assert each.computed == pytest.approx(seen["computed"] / (10 * neurons), abs=0.01)
        assert each.fired == pytest.approx(seen["used"] / (10 * neurons), abs=0.01)
        assert each.recall == pytest.approx(seen["used"] / seen["truth"], abs=0.02)
        assert each.hot == 32 / neurons and 0 < each.skipped < 1
    np.testing.assert_array_equal(logits(ours, "predicted", observe="stats"), logits(ours, "predicted"))


def test_statistics_of_exact_and_dense(ours):
    for sparsity, mode in (("exact", "exact"), ("dense", "dense")):
        with load_model(ours, sparsity=sparsity, observe="stats") as model:
            session = Session(model, 64, 2)
            for token in TOKENS[:5]:
                session.step([token], [0])
            stats = layer_stats(session)
            session.close()
        assert {each.mode for each in stats} == {mode}
        assert all((each.skipped > 0) == (mode == "exact") and each.recall == 1 for each in stats)


DAMAGES = ["rank", "shape", "missing", "nan", "flipped", "no entry", "one layer", "not finite"]
DAMAGES += ["bias", "type of bias", "type", "level", "cut off"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_predictors_leave_an_exact_model(damage, tmp_path):
    """One sentence, and the model runs as if it had none."""
    predictors = random_predictors("relu_llama")
    keys: dict[str, object] = {}
    extra, changes = {}, {}
    if damage == "rank":
        predictors[1] = predictors[1][0][:16], predictors[1][1]
    elif damage == "shape":
        predictors[0] = predictors[0][0][:, :16], predictors[0][1]
    elif damage == "missing":
        del predictors[1]
    elif damage == "not finite":
        keys = {names.POWERINFER_SPARSE_THRESHOLD: float("nan")}
    elif damage == "bias":
        extra = {"blk.0.fc1.bias": np.zeros(5, np.float32)}
    elif damage == "type of bias":
        extra = {"blk.1.fc2.bias": np.zeros(len(predictors[1][1]), np.float64)}
    elif damage == "type":
        predictors[1] = predictors[1][0], predictors[1][1].astype(np.float64)
    elif damage == "level":
        changes = {"threshold": 10**299}
    path = sparse_gguf(tmp_path / "model.gguf", "relu_llama", "q8_0", predictors, keys, extra)
    thresholds = np.zeros(_shape(path))
    if damage == "nan":
        thresholds[1, 3] = np.nan
    if damage == "one layer":
        thresholds = thresholds[:1]
    if damage not in ("no entry", "not finite"):
        _with_predictors(path, thresholds, **changes)
    if damage == "flipped":
        data = bytearray(path.read_bytes())
        data[-200] ^= 4
        path.write_bytes(data)
    if damage == "cut off":
        path.write_bytes(path.read_bytes()[:-1])
    for sparsity in ("auto", "predicted"):
        with load_model(path, sparsity=sparsity) as model:
            assert model.plan.modes == {"exact"}
            (notice,) = model.notices
        assert "\n" not in notice and "predictors" in notice and path.name in notice
        assert notice.count("the model runs without") == 1 and notice.count("pyinfer-convert predict`") == 1
        assert "profile" not in notice
    np.testing.assert_array_equal(logits(path, "auto"), logits(path, "dense"))


@pytest.mark.parametrize("damage", ["flipped", "one layer", "rank"])
def test_lost_predictors_are_not_taken_for_powerinfers(damage, tmp_path):
    """The file's key would give ours, which are linear and read the norm, another meaning."""
    path = sparse_gguf(
        tmp_path / "model.gguf", "relu_llama", "f32", random_predictors("relu_llama"), POWERINFER
    )
    layers, neurons = _shape(path)
    rows = 1 if damage == "one layer" else layers
    _with_predictors(path, np.zeros((rows, neurons)), rank=31 if damage == "rank" else 32)
    if damage == "flipped":
        data = bytearray(path.read_bytes())
        data[-200] ^= 4
        path.write_bytes(data)
    with load_model(path) as model:
        assert model.plan.modes == {"exact"} and len(model.notices) == 1


@pytest.mark.parametrize("name", ["gemma3", "qwen3"])
def test_families_without_the_input_that_predictors_read(name, tmp_path):
    path = sparse_gguf(tmp_path / "model.gguf", name, "f32", random_predictors(name), POWERINFER)
    with load_model(path, sparsity="predicted") as model:
        assert model.plan.modes == {"dense"}
        (notice,) = model.notices
    assert "predictors of this family read the normed input; the model runs without its" in notice


def test_a_damaged_section_of_a_model_without_predictors(tmp_path):
    path = sparse_gguf(tmp_path / "model.gguf", "relu_llama")
    layers, neurons = _shape(path)
    profile = Profile(np.zeros((layers, neurons), np.int64), 9, [], None, "relu")
    update_section(path, profile=profile.to_entry())
    path.write_bytes(path.read_bytes()[:-1])
    with load_model(path) as model:
        (notice,) = model.notices
    assert notice.startswith("model.gguf: its placement section ")
    assert notice.endswith(
        "; the model runs without it, and `pyinfer-convert profile --fresh` makes a new one"
    )
    with pytest.raises(InputError, match="cats needs the profile in it; `pyinfer-convert profile --fresh`"):
        load_model(path, sparsity="cats=0.5")


@pytest.mark.parametrize("observe", ["fired", "histogram", "rows"])
def test_observing_runs_dense_but_checks_the_sparsity(observe, ours):
    with load_model(ours, sparsity="exact", observe=observe) as model:
        assert model.plan.modes == {"dense"}
    with pytest.raises(InputError, match="sparsity is 'exactly'"):
        load_model(ours, sparsity="exactly", observe=observe)


def test_models_that_are_never_zero(tmp_path):
    path = sparse_gguf(tmp_path / "model.gguf", "llama")
    with load_model(path) as model:
        assert model.plan.modes == {"dense"}
    with pytest.raises(InputError, match=r"exact.*silu leaves no neuron at zero"):
        load_model(path, sparsity="exact")
    with pytest.raises(InputError, match=r"needs a profile.*pyinfer-convert profile"):
        load_model(path, sparsity="cats=0.5")


@pytest.mark.parametrize(
    "text", ["", "sparse", "cats", "cats=", "cats=x", "cats=0", "cats=1.5", "cats=nan", "exact=1"]
)
def test_unknown_sparsity(text):
    with pytest.raises(InputError, match="sparsity is"):
        parse_sparsity(text)


@given(seed=st.integers(0, 2**31))
@settings(max_examples=15, deadline=None)
def test_any_thresholds(seed, ours_once):
    """Every neuron is computed iff its score reaches its threshold, whatever the thresholds are."""
    random = np.random.default_rng(seed)
    thresholds = random.standard_normal(_shape(ours_once)) * random.choice([0.1, 1, 10])
    thresholds[random.random(thresholds.shape) < 0.2] = -np.inf
    _with_predictors(ours_once, thresholds)
    assert apart(logits(ours_once, "predicted"), expected_logits(ours_once, "predicted")) < 1e-3


@pytest.fixture(scope="module")
def ours_once(tmp_path_factory):
    path = tmp_path_factory.mktemp("any") / "ours.gguf"
    return sparse_gguf(path, "minicpm_s", "f32", random_predictors("minicpm_s"))
