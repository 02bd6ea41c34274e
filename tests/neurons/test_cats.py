"""The measured price of thresholds: stored, read, and looked up between what was measured."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyinfer.errors import FormatError
from pyinfer.neurons.cats import expected_loss, from_entry, to_entry
from pyinfer.section import Entry, Section

MEASURED = {0.5: 12.0, 0.0: 10.0, 0.25: 10.5}


def test_an_entry_is_what_json_holds():
    info = json.loads(json.dumps(to_entry(MEASURED).info))
    assert info == {"perplexity": {"0": 10.0, "0.25": 10.5, "0.5": 12.0}}
    assert list(from_entry(Entry(info)).items()) == [(0.0, 10.0), (0.25, 10.5), (0.5, 12.0)]


@pytest.mark.parametrize(
    ("share", "loss"), [(0.0, 0), (0.25, 0.05), (0.5, 0.2), (0.125, 0.025), (0.4, 0.05 + 0.6 * 0.15)]
)
def test_the_loss_between_measured_shares(share, loss):
    entry = to_entry(MEASURED)
    assert expected_loss(entry, share) == pytest.approx(loss)
    assert expected_loss(Section({"thresholds": entry}), share) == pytest.approx(loss)


def test_what_was_not_measured_is_not_made_up():
    assert expected_loss(to_entry(MEASURED), 0.51) is None
    assert expected_loss(Section({"profile": to_entry(MEASURED)}), 0.25) is None
    assert expected_loss(None, 0.25) is None


@given(st.dictionaries(st.sampled_from([0.1, 0.2, 0.4, 0.9]), st.floats(1, 1e6)), st.floats(0, 0.95))
def test_the_loss_lies_between_its_neighbours(measured, share):
    measured[0.0] = 7.0
    loss = expected_loss(to_entry(measured), share)
    if share > max(measured):
        assert loss is None
        return
    below = measured[max(each for each in measured if each <= share)] / 7 - 1
    above = measured[min(each for each in measured if each >= share)] / 7 - 1
    assert min(below, above) - 1e-9 * abs(below) - 1e-12 <= loss
    assert loss <= max(below, above) + 1e-9 * abs(above) + 1e-12


@pytest.mark.parametrize(
    "info",
    [
        {},
        {"perplexity": 3},
        {"perplexity": {}},
        {"perplexity": {"0.5": 10.0}},
        {"perplexity": {"0": 10.0, "x": 11.0}},
        {"perplexity": {"0": 10.0, "nan": 11.0}},
        {"perplexity": {"0": 10.0, "1": 11.0}},
        {"perplexity": {"0": 10.0, "-0.5": 11.0}},
        {"perplexity": {"0": 0.5}},
        {"perplexity": {"0": float("nan")}},
        {"perplexity": {"0": float("inf")}},
        {"perplexity": {"0": True}},
        {"perplexity": {"0": None}},
        {"perplexity": {"0": 10**400}},
    ],
)
def test_what_cannot_be_true_is_one_sentence(info):
    with pytest.raises(FormatError, match="expected"):
        from_entry(Entry(info))
