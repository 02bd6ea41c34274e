"""The sampler against a plain definition of its chain in float64, and its draws against exact
distributions.
"""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pyinfer.errors import InputError, UnsupportedError
from pyinfer.runtime.sampler import Sampler, SamplingParams, most_probable, token_logprob


def chi_square_limit(freedom):
    """Exceeded by chance in about one of a million tests (Wilson and Hilferty, 1931;

    a little above for 1 and 2).
    """
    spread = 2 / (9 * freedom)
    return freedom * (1 - spread + 4.75 * math.sqrt(spread)) ** 3


def distribution(logits, params, seen=()):
    """Probability of every token, step by step as the chain is defined: no candidate lists, no shortcuts."""
    values = [float(v) for v in logits]
    for token, bias in params.logit_bias.items():
        values[token] += bias
    window = list(seen)
    if params.penalty_last_n >= 0:
        window = window[len(window) - min(params.penalty_last_n, len(window)) :]
    for token, count in Counter(window).items():
        scale = params.repeat_penalty
        values[token] = values[token] / scale if values[token] > 0 else values[token] * scale
        values[token] -= count * params.frequency_penalty + params.presence_penalty
    order = sorted(range(len(values)), key=lambda t: (-values[t], t))
    if params.temperature == 0:
        return {order[0]: 1.0}
    if params.top_k > 0:
        order = order[: params.top_k]
    top = values[order[0]]
    if params.top_p < 1:
        total = math.fsum(math.exp(values[t] - top) for t in order)
        kept, mass = [], 0.0
        for token in order:
            kept.append(token)
            mass += math.exp(values[token] - top) / total
            if mass >= params.top_p:
                break
        order = kept
    if params.min_p > 0:
        order = [t for t in order if math.exp(values[t] - top) >= params.min_p]
    weights = {t: math.exp((values[t] - top) / params.temperature) for t in order}
    total = math.fsum(weights.values())
    return {t: w / total for t, w in weights.items()}


def assert_draws(logits, params, draws=4000, seen=()):
    """Every drawn token is possible, and the counts pass a chi-square test."""
    expected = distribution(logits, params, seen)
    sampler = Sampler(params)
    counts = Counter()
    for _ in range(draws):
        for token in seen:
            sampler.accept(token)
        counts[sampler.sample(logits)] += 1
    assert set(counts) <= set(expected)
    cells = sorted(expected.items(), key=lambda cell: -cell[1])[:10]
    tested = [(counts[t], p * draws) for t, p in cells if p * draws >= 5]
    rest = draws - sum(count for count, _ in tested), draws - sum(mean for _, mean in tested)
    if rest[1] >= 5:
        tested.append(rest)
    if len(tested) > 1:
        statistic = sum((count - mean) ** 2 / mean for count, mean in tested)
        assert statistic < chi_square_limit(len(tested) - 1)


def logits_of(size, seed, scale=2.0):
    return (np.random.default_rng(seed).normal(size=size) * scale).astype(np.float32)


CHAINS = {
    "default": {},
    "temperature only": {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 1.0},
    "hot": {"top_k": 0, "top_p": 1.0, "min_p": 0.0, "temperature": 3.0},
    "cold": {"temperature": 0.2},
    "top-k 1": {"top_k": 1},
    "top-k 3": {"top_k": 3, "top_p": 1.0, "min_p": 0.0},
    "top-k -1": {"top_k": -1, "top_p": 1.0, "min_p": 0.2},
    "top-p small": {"top_k": 0, "top_p": 0.3, "min_p": 0.0},
    "top-p 0": {"top_p": 0.0},
    "top-p without top-k": {"top_k": 0, "top_p": 0.9, "min_p": 0.0},
    "min-p": {"top_k": 0, "top_p": 1.0, "min_p": 0.1},
    "min-p 1": {"min_p": 1.0},
    "bias": {"logit_bias": {1: 3.0, 2: -math.inf}, "top_k": 0, "top_p": 1.0, "min_p": 0.0},
    "larger than the vocabulary": {"top_k": 10_000},
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS.keys())
@pytest.mark.parametrize("size", [7, 500])
def test_draws_follow_the_definition(chain, size):
    assert_draws(logits_of(size, seed=size), SamplingParams(seed=1, **chain))


PENALTIES = {
    "repeat": {"repeat_penalty": 1.7},
    "reward": {"repeat_penalty": 0.6},
    "frequency": {"frequency_penalty": 0.8},
    "presence": {"presence_penalty": 1.5},
    "short window": {"frequency_penalty": 1.0, "penalty_last_n": 2},
    "whole history": {"frequency_penalty": 1.0, "penalty_last_n": -1},
    "no window": {"frequency_penalty": 1.0, "penalty_last_n": 0},
}


@pytest.mark.parametrize("penalties", PENALTIES.values(), ids=PENALTIES.keys())
def test_penalties_follow_the_definition(penalties):
    logits, seen = logits_of(12, seed=5), [3, 3, 0, 7, 3, 11, 0]
    params = SamplingParams(top_k=0, top_p=1.0, min_p=0.0, **penalties)
    expected = distribution(logits, params, seen)
    counts = Counter()
    for seed in range(1500):
        sampler = Sampler(SamplingParams(top_k=0, top_p=1.0, min_p=0.0, seed=seed, **penalties))
        for token in seen:
            sampler.accept(token)
        counts[sampler.sample(logits)] += 1
    cells = [(counts[t], p * 1500) for t, p in expected.items() if p * 1500 >= 5]
    statistic = sum((count - mean) ** 2 / mean for count, mean in cells)
    assert statistic < chi_square_limit(len(cells) - 1)


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.floats(-30, 30, width=16), min_size=1, max_size=200),
    seen=st.lists(st.integers(0, 199), max_size=20),
    frequency=st.floats(-2, 2),
    repeat=st.floats(0.5, 2),
)
def test_greedy_takes_the_largest_adjusted_logit(logits, seen, frequency, repeat):
    logits = np.array(logits, np.float32)
    seen = [token % len(logits) for token in seen]
    params = SamplingParams(temperature=0, frequency_penalty=frequency, repeat_penalty=repeat)
    sampler = Sampler(params)
    for token in seen:
        sampler.accept(token)
    before = logits.copy()
    chosen = sampler.sample(logits)
    values = logits.astype(np.float64)
    for token, count in Counter(seen).items():
        values[token] = values[token] / repeat if values[token] > 0 else values[token] * repeat
        values[token] -= count * frequency
    assert values[chosen] >= values.max() - 1e-4  # the sampler computes in float32
    assert (logits == before).all()


def test_greedy_takes_the_first_of_equal_logits():
    logits = np.zeros(1000, np.float32)
    logits[[17, 400, 999]] = 3
    assert Sampler(SamplingParams(temperature=0)).sample(logits) == 17
    assert Sampler(SamplingParams(top_k=1)).sample(logits) == 17


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(1, 1500),
    count=st.integers(1, 60),
    levels=st.sampled_from([2, 5, 1000]),
    seed=st.integers(0, 2**32),
)
def test_most_probable_equals_a_full_sort(size, count, levels, seed):
    logits = np.random.default_rng(seed).integers(-levels, levels, size).astype(np.float32)
    expected = sorted(range(size), key=lambda t: (-logits[t], t))[:count]
    assert most_probable(logits, count).tolist() == expected


def test_most_probable_with_forbidden_tokens():
    logits = np.full(5000, -np.inf, np.float32)
    logits[[4000, 7]] = [2, 1]
    assert most_probable(logits, 4).tolist() == [4000, 7, 0, 1]
    assert {Sampler(SamplingParams(seed=s)).sample(logits) for s in range(60)} == {4000, 7}


def test_the_same_seed_draws_the_same_tokens():
    logits = logits_of(300, seed=2)

    def draw(seed):
        sampler = Sampler(SamplingParams(temperature=2.0, top_k=0, top_p=1.0, min_p=0.0, seed=seed))
        return [sampler.sample(logits) for _ in range(20)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(None) != draw(None)
    assert draw(-1) != draw(-1)


def test_samplers_do_not_touch_the_global_generator():
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    Sampler(SamplingParams(seed=1)).sample(logits_of(50, seed=1))
    assert np.random.random() == expected


@pytest.mark.parametrize("temperature", [1e-30, 1e-320, 1e30])
def test_extreme_temperatures(temperature):
    logits = np.array([1, 3, 2], np.float32)
    params = [SamplingParams(temperature=temperature, min_p=0, seed=seed) for seed in range(60)]
    drawn = {Sampler(chain).sample(logits) for chain in params}
    assert drawn == ({0, 1, 2} if temperature > 1 else {1})


@pytest.mark.parametrize("temperature", [0, 0.8])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_bad_logits_are_a_sentence(temperature, bad):
    logits = logits_of(200, seed=1)
    logits[150] = bad
    with pytest.raises(InputError, match=r"largest of 200 logits is (nan|inf)"):
        Sampler(SamplingParams(temperature=temperature)).sample(logits)


def test_nothing_left_to_draw_is_a_sentence():
    with pytest.raises(InputError, match="-inf"):
        Sampler().sample(np.full(9, -np.inf, np.float32))
    with pytest.raises(InputError, match="every token is forbidden"):
        Sampler(SamplingParams(logit_bias={0: -math.inf, 1: -math.inf})).sample(np.zeros(2, np.float32))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1), ("temperature", math.nan), ("temperature", math.inf), ("temperature", "1"),
        ("top_k", -2), ("top_k", 1.5), ("top_k", True), ("top_p", 1.1), ("top_p", -0.1), ("top_p", math.nan),
        ("min_p", 1.5), ("min_p", -1), ("repeat_penalty", 0), ("repeat_penalty", math.inf),
        ("frequency_penalty", math.nan), ("presence_penalty", math.inf), ("penalty_last_n", -2), ("seed", -2),
        ("seed", 2**64), ("seed", 1.0), ("logit_bias", 3), ("logit_bias", {"x": 1}), ("logit_bias", {-1: 1}),
        ("logit_bias", {1: math.nan}), ("logit_bias", {1: math.inf}), ("logit_bias", {1: None}),
    ],
)  # fmt: skip
def test_parameters_out_of_range_name_field_and_value(name, value):
    with pytest.raises(InputError, match=f"^{name} .*expected"):
        SamplingParams(**{name: value})


def test_bias_of_an_unknown_token():
    with pytest.raises(InputError, match="token 9, the model has 5"):
        Sampler(SamplingParams(logit_bias={9: 1.0})).sample(np.zeros(5, np.float32))


def test_bias_keys_may_be_text_as_in_json():
    assert SamplingParams(logit_bias={"3": -5}).logit_bias == {3: -5.0}


def test_keywords():
    params = SamplingParams.from_keywords({"temperature": 0.1, "top_k": None, "seed": 3, "tools": None})
    assert params == SamplingParams(temperature=0.1, seed=3)
    with pytest.raises(TypeError, match=r"'temprature'.*temperature, top_k"):
        SamplingParams.from_keywords({"temprature": 0.1})
    with pytest.raises(TypeError):
        SamplingParams.from_keywords({"temprature": None})
    with pytest.raises(UnsupportedError, match=r"suffix is not supported.*temperature"):
        SamplingParams.from_keywords({"suffix": "x"})


@pytest.mark.parametrize("size", [3, 700])
def test_logprobs_are_the_logarithms_of_the_softmax(size):
    logits = logits_of(size, seed=9, scale=8)
    exact = logits.astype(np.float64)
    exact = exact - np.log(np.exp(exact).sum())
    entry = token_logprob(logits, 1, 5)
    order = np.argsort(-exact, kind="stable")[:5]
    assert entry.token == 1
    assert entry.logprob == pytest.approx(exact[1], abs=1e-5)
    assert [token for token, _ in entry.top] == order.tolist()
    assert [value for _, value in entry.top] == pytest.approx(exact[order].tolist(), abs=1e-5)
    assert token_logprob(logits, 0, 0).top == ()
