"""Predictors: the fit against brute force, thresholds against their definition, entries against damage."""

from __future__ import annotations

import itertools
import math

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyinfer import names
from pyinfer.errors import FormatError, InputError
from pyinfer.gguf_file import open_gguf
from pyinfer.neurons.low_rank import (
    CLIP_ABOVE,
    CLIP_BELOW,
    QUIET_WEIGHT,
    STOPPED,
    Calibration,
    Gate,
    as_int8,
    calibrate,
    level_at_recall,
    moments,
    scores,
)
from pyinfer.neurons.predictor import PredictorQuality, Predictors, Tally, predictor_ranks
from pyinfer.neurons.predictor_search import Candidate, candidate_ranks, divide_budget
from pyinfer.section import Entry

WIDTH, NEURONS, ROWS = 12, 20, 1500


@pytest.fixture(scope="module")
def layer():
    """x with correlated columns and a mean, gates with bias and threshold, and who fired (as with dReLU)."""
    random = np.random.default_rng(1)
    x = random.standard_normal((ROWS, WIDTH)) @ random.standard_normal((WIDTH, WIDTH)) + 0.5
    gate = Gate(
        random.standard_normal((NEURONS, WIDTH)).astype(np.float32),
        random.standard_normal(NEURONS).astype(np.float32),
        0.3,
    )
    x = x.astype(np.float32)
    open_ = x @ gate.weight.T + gate.bias > gate.threshold
    return x, gate, open_ & (random.random((ROWS, NEURONS)) < 0.7)


def chunked(x, fired, step=700):
    return lambda: ((x[n : n + step], fired[n : n + step]) for n in range(0, len(x), step))


def targets(x, gate, fired):
    """What is regressed, by its definition, in float64, without its mean."""
    margin = x.astype(np.float64) @ gate.weight.T + gate.bias - gate.threshold
    z = margin / margin.std(0)
    target = np.clip(z, CLIP_BELOW, CLIP_ABOVE)
    target[(z > 0) & ~fired] = STOPPED
    return target - target.mean(0)


def residual(target, x, fc1, fc2):
    return float(((target - (x - x.mean(0)) @ fc1.T.astype(np.float64) @ fc2.T) ** 2).sum())


@pytest.mark.parametrize("rank", [1, 3, 7, WIDTH])
def test_no_other_matrices_of_the_rank_come_closer(layer, rank):
    x, gate, fired = layer
    found = moments(chunked(x, fired), gate).fit(WIDTH)
    target = targets(x, gate, fired)
    centred = x.astype(np.float64) - x.mean(0)
    full = np.linalg.lstsq(centred, target, rcond=None)[0].T
    gram = centred.T @ centred
    fc1 = np.random.default_rng(rank).standard_normal((rank, WIDTH))
    for _ in range(400):  # alternating least squares: no eigenvalues, no whitening
        fc2 = full @ gram @ fc1.T @ np.linalg.inv(fc1 @ gram @ fc1.T)
        fc1 = np.linalg.inv(fc2.T @ fc2) @ fc2.T @ full
    least = residual(target, x, fc1, fc2)
    assert residual(target, x, found.fc1[:rank], found.fc2[:, :rank]) == pytest.approx(least, rel=1e-3)
    turned = found.first(rank)
    assert residual(target, x, turned, found.second(turned)) == pytest.approx(least, rel=1e-3)


def test_second_is_the_least_squares_fit_to_any_first(layer):
    x, gate, fired = layer
    found = moments(chunked(x, fired), gate).fit(4)
    fc1 = np.round(found.first(4), 1)
    centred = (x.astype(np.float64) - x.mean(0)) @ fc1.T
    expected = np.linalg.lstsq(centred, targets(x, gate, fired), rcond=None)[0].T
    np.testing.assert_allclose(found.second(fc1), expected, atol=2e-4 * np.abs(expected).max())


def test_a_fit_does_not_depend_on_the_chunks(layer):
    x, gate, fired = layer
    one, many = (moments(chunked(x, fired, step), gate).fit(5) for step in (ROWS, 64))
    np.testing.assert_allclose(one.cross, many.cross, atol=1e-4 * np.abs(one.cross).max())
    np.testing.assert_allclose(one.fc2 @ one.fc1, many.fc2 @ many.fc1, atol=1e-4)


def test_neurons_that_read_few_directions_are_predicted_well():
    random = np.random.default_rng(3)
    x = random.standard_normal((6000, 64)).astype(np.float32)
    weight = (random.standard_normal((96, 4)) @ random.standard_normal((4, 64))).astype(np.float32)
    gate = Gate(weight, np.full(96, -weight.std() * 10, np.float32))
    fired = gate.margin(x) > 0
    found = moments(chunked(x[:4000], fired[:4000]), gate).fit(4)
    score = scores(x, found.fc1, found.fc2, "linear")
    calibration = calibrate(score[4000:5000], fired[4000:5000])
    level = level_at_recall(calibration.odds(score[4000:5000]), fired[4000:5000], 0.99)
    tally = Tally()
    tally.add(score[5000:] >= calibration.thresholds(level), fired[5000:])
    shares = tally.shares()
    assert 0.05 < shares["fired"] < 0.3
    assert shares["recall"] > 0.98 and shares["precision"] > 0.75


@pytest.mark.parametrize("damage", [np.nan, np.inf])
def test_rows_and_gates_that_are_no_numbers_are_refused(layer, damage):
    x, gate, fired = layer
    bad = x.copy()
    bad[5, 5] = damage
    with np.errstate(all="ignore"), pytest.raises(InputError, match="not finite"):
        moments(chunked(bad, fired), gate).fit(3)
    weight = gate.weight.copy()
    weight[0, 0] = damage
    with np.errstate(all="ignore"), pytest.raises(InputError, match="not finite"):
        moments(chunked(x, fired), Gate(weight)).fit(3)
    with pytest.raises(InputError, match="no tokens"):
        moments(lambda: iter(()), gate).fit(3)


def test_a_layer_in_which_nothing_happens_has_a_finite_predictor():
    x, fired = np.zeros((100, 64), np.float32), np.zeros((100, 32), bool)
    found = moments(chunked(x, fired), Gate(np.zeros((32, 64), np.float32))).fit(32)
    fc1 = found.first(32)
    score = scores(x, fc1, found.second(fc1), "linear")
    calibration = calibrate(score, fired)
    assert np.isfinite(fc1).all() and np.isfinite(score).all()
    assert level_at_recall(calibration.odds(score), fired, 0.99) == -math.inf
    assert (calibration.thresholds(-math.inf) == -np.inf).all()  # all is computed


@pytest.mark.parametrize("form", ["relu", "linear"])
def test_scores_are_those_of_activations_in_8_bits(form):
    random = np.random.default_rng(0)
    x, fc1, fc2 = (
        random.standard_normal(shape).astype(np.float32) for shape in ((5, 64), (32, 64), (40, 32))
    )

    def slow_int8(row):
        out = []
        for first in range(0, len(row), 32):
            block = [float(v) for v in row[first : first + 32]]
            scale = max(map(abs, block)) / 127
            out += [round(v / scale) * scale for v in block]
        return np.array(out)

    for row, found in zip(x, scores(x, fc1, fc2, form)):
        small = fc1.astype(np.float64) @ slow_int8(row)
        small = np.maximum(small, 0) if form == "relu" else small
        np.testing.assert_allclose(found, fc2.astype(np.float64) @ slow_int8(small), rtol=0.02, atol=0.05)
    assert as_int8(np.zeros((2, 32), np.float32)).any() == 0


def test_calibration_finds_the_curve_that_made_the_firings():
    random = np.random.default_rng(2)
    slope, offset = np.array([0.5, 2, 8]), np.array([-1, 0, -6])
    score = random.standard_normal((60000, 3)) * [3, 1, 0.5] + [1, 0, 0.7]
    fired = random.random(score.shape) < 1 / (1 + np.exp(-(slope * score + offset)))
    found = calibrate(score.astype(np.float32), fired, steps=30)
    np.testing.assert_allclose(found.slope, slope, rtol=0.06)
    # a firing weighs 1 / QUIET_WEIGHT as much, which multiplies the odds
    np.testing.assert_allclose(found.offset - math.log(1 / QUIET_WEIGHT), offset, atol=0.25)


@given(
    st.lists(st.tuples(st.integers(-20, 20), st.booleans()), min_size=1, max_size=60),
    st.floats(0.5, 0.9999),
)
def test_the_level_is_the_highest_with_the_recall(pairs, recall):
    odds = np.array([[value / 4 for value, _ in pairs]], np.float32)
    fired = np.array([[each for _, each in pairs]])
    level = level_at_recall(odds, fired, recall)
    if not fired.any():
        assert level == -math.inf
        return
    reaching = {
        value: (odds[fired] >= value).sum() / fired.sum() for value in [*map(float, odds[fired]), 100.0]
    }
    missed = {value: round((1 - share) * fired.sum()) for value, share in reaching.items()}
    allowed = int((1 - recall) * fired.sum())
    assert level == max(value for value, count in missed.items() if count <= allowed)


@given(st.floats(-5, 5))
def test_thresholds_say_what_the_level_says(level):
    random = np.random.default_rng(0)
    calibration = Calibration(
        random.uniform(0.1, 9, 30).astype(np.float32), random.standard_normal(30).astype(np.float32)
    )
    score = random.standard_normal((50, 30)).astype(np.float32)
    odds = calibration.odds(score)
    clear = np.abs(odds - level) > 1e-4
    assert ((score >= calibration.thresholds(level)) == (odds >= level))[clear].all()


def test_shares_count_hits_guesses_and_firings():
    tally = Tally()
    tally.add(np.array([[1, 1, 0, 0]], bool), np.array([[1, 0, 1, 0]], bool))
    tally.add(np.array([[1, 0, 0, 0]], bool), np.array([[1, 0, 0, 0]], bool))
    assert tally.shares() == {"recall": 2 / 3, "precision": 2 / 3, "predicted": 3 / 8, "fired": 3 / 8}
    assert Tally().shares()["recall"] == 1


# ---- sizes


@given(st.integers(32, 9000), st.floats(1, 4000))
def test_ranks_to_try_are_blocks_within_the_width(width, usual):
    ranks = candidate_ranks(width, usual)
    assert ranks == sorted(set(ranks)) and ranks[0] == 32 and len(ranks) <= 17
    assert all(rank % 32 == 0 and rank <= max(width, 32) for rank in ranks)
    assert ranks[-1] <= max(32, 3 * usual)


def curves(seed, n_layers, n_sizes):
    """Sizes of 10 bytes and falling bytes of rows, each step saving less than the one before."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(n_layers):
        saved = np.sort(random.uniform(0, 40, n_sizes - 1))[::-1]
        rows = 200 - np.concatenate([[0], np.cumsum(saved)])
        made.append([Candidate(32 * (n + 1), 10 * (n + 1), float(value)) for n, value in enumerate(rows)])
    return made


@given(st.integers(0, 200), st.integers(3, 12))
def test_the_budget_is_divided_as_brute_force_divides_it(seed, tens):
    layers = curves(seed, 3, 4)
    chosen = divide_budget(layers, 10 * tens)

    def spent(places):
        return sum(layer[place].predictor_bytes for layer, place in zip(layers, places))

    def worth(places):
        return sum(
            2 * layer[place].row_bytes + layer[place].predictor_bytes for layer, place in zip(layers, places)
        )

    possible = [each for each in itertools.product(range(4), repeat=3) if spent(each) <= 10 * tens]
    assert spent(chosen) <= 10 * tens
    assert worth(chosen) == pytest.approx(min(map(worth, possible)))


def test_a_step_that_pays_only_behind_another_is_taken_at_once():
    flat = [Candidate(32, 10, 100.0), Candidate(64, 20, 99.0), Candidate(96, 30, 20.0)]
    assert divide_budget([flat], 30) == [2]
    assert divide_budget([flat], 29) == [0]  # the step between saves less than it costs


# ---- what the section says


def quality(**changes):
    usual = {
        "rank": 32,
        "form": "linear",
        "input": "norm",
        "threshold": -1.5,
        "recall": 0.99,
        "precision": 0.5,
        "predicted": 0.2,
        "fired": 0.1,
        "tokens": 1000,
    }
    return PredictorQuality(**{**usual, **changes})


def predictors():
    thresholds = np.arange(6, dtype=np.float32).reshape(2, 3)
    thresholds[0, 0] = -np.inf
    return Predictors(
        (quality(), quality(rank=64, threshold=-math.inf, form="relu", input="raw")), thresholds
    )


def test_an_entry_is_read_as_it_was_written():
    made = predictors()
    found = Predictors.from_entry(made.to_entry(), 2, 3)
    assert found.layers == made.layers
    np.testing.assert_array_equal(found.thresholds, made.thresholds)
    found.agree_with([32, 64])
    with pytest.raises(FormatError, match="layer 1 has rank 32, its entry in the section says 64"):
        found.agree_with([32, 32])


@pytest.mark.parametrize(
    "name, value",
    [
        ("rank", 0),
        ("rank", -1),
        ("rank", 1 << 60),
        ("rank", 32.0),
        ("rank", True),
        ("form", "gelu"),
        ("form", 3),
        ("input", None),
        ("threshold", math.nan),
        ("threshold", "low"),
        pytest.param("threshold", 10**400, id="threshold-huge"),
        pytest.param("threshold", -(10**400), id="threshold-low"),
        ("threshold", 1e31),
        ("recall", 1.01),
        ("precision", -0.1),
        ("predicted", math.nan),
        ("fired", None),
        ("tokens", -5),
        ("tokens", 1.5),
    ],
)
def test_a_wrong_value_is_one_sentence(name, value):
    entry = predictors().to_entry()
    entry.info["layers"][1][name] = value
    with pytest.raises(
        FormatError, match=f"says {name} .* of layer 1, expected .*; make new predictors$"
    ) as error:
        Predictors.from_entry(entry, 2, 3)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "thresholds, words",
    [
        (None, "shape None"),
        (np.zeros((2, 4), np.float32), "expected float32"),
        (np.zeros((2, 3), np.float64), "expected float32"),
        (np.full((2, 3), np.nan, np.float32), "layer 0, neuron 0 is no number"),
    ],
)
def test_wrong_thresholds_are_one_sentence(thresholds, words):
    info = predictors().to_entry().info
    arrays = {} if thresholds is None else {"thresholds": thresholds}
    with pytest.raises(FormatError, match=words):
        Predictors.from_entry(Entry(info, arrays), 2, 3)


@pytest.mark.parametrize("layers", [None, [], [1, 2], {"0": 1}])
def test_an_entry_without_its_layers_is_refused(layers):
    entry = Entry({"layers": layers}, predictors().to_entry().arrays)
    with pytest.raises(FormatError, match="layer"):
        Predictors.from_entry(entry, 2, 3)


def model_file(path, shapes):
    """A file with only predictors: {name: NumPy shape}."""
    writer = gguf.GGUFWriter(path, "llama")
    for name, shape in shapes.items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def good(n_layers=2):
    return {
        names.weight(part, layer): shape
        for layer in range(n_layers)
        for part, shape in (("fc1", (8 + layer, 32)), ("fc2", (40, 8 + layer)))
    }


def test_ranks_are_those_of_the_matrices(tmp_path):
    with open_gguf(model_file(tmp_path / "a.gguf", good())) as file:
        assert predictor_ranks(file, 2, 32, 40) == [8, 9]
    with open_gguf(model_file(tmp_path / "b.gguf", {"x": (4,)})) as file:
        assert predictor_ranks(file, 2, 32, 40) is None


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"blk.1.fc2.weight": None}, "blk.1.fc2.weight is missing"),
        ({"blk.1.fc2.weight": (40, 8)}, "layer 1 has shapes"),
        ({"blk.0.fc1.weight": (8, 16)}, "layer 0 has shapes"),
        ({"blk.0.fc2.weight": (41, 8)}, "layer 0 has shapes"),
        ({"blk.0.fc1.weight": (32,), "blk.0.fc2.weight": (40,)}, "layer 0 has shapes"),
    ],
)
def test_ragged_matrices_are_one_sentence(tmp_path, changes, words):
    shapes = {name: shape for name, shape in {**good(), **changes}.items() if shape is not None}
    with open_gguf(model_file(tmp_path / "a.gguf", shapes)) as file, pytest.raises(FormatError, match=words):
        predictor_ranks(file, 2, 32, 40)
