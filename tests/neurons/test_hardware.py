"""Figures of a machine: what they mean for neurons, and files of them, also bad ones."""

from __future__ import annotations

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pyinfer import jit
from pyinfer.errors import FormatError, InputError, ModelNotFoundError
from pyinfer.neurons.hardware import (
    GPUS,
    SYNC_SECONDS,
    USUAL_GPU,
    Hardware,
    hardware_from_dict,
    measure_hardware,
    read_hardware,
    write_hardware,
)

MACHINE = Hardware("a CPU", "a GPU", 67e9, 1008e9, 20e-6, 24 << 30, ("cpu_bytes_per_second",))


def test_the_fewest_neurons_of_a_7b_layer():
    # 3 rows of 4096 in Q4_0: 6912 bytes, 0.1032 us on the CPU, 0.0069 us on the GPU.
    assert MACHINE.least_neurons(6912) == 208
    assert Hardware("", "", 67e9, 67e9, 20e-6, 1).least_neurons(6912) is None
    assert Hardware("", "", 67e9, 30e9, 20e-6, 1).least_neurons(6912) is None


@given(st.integers(1, 10**6), st.integers(1, 10**12), st.integers(1, 10**12), st.integers(1, 10**6))
def test_the_fewest_neurons_repay_the_meeting_and_one_less_does_not(n_bytes, cpu, gpu, microseconds):
    found = Hardware("", "", float(cpu), float(gpu), microseconds / 1e6, 1).least_neurons(n_bytes)
    gain, meeting = Fraction(n_bytes, cpu) - Fraction(n_bytes, gpu), Fraction(microseconds, 10**6)
    if gain <= 0:
        # Times of both that agree to the last bit may differ by rounding.
        assert found is None or gain > -Fraction(n_bytes, cpu) / 10**12
    elif found is not None:
        slack = Fraction(n_bytes, cpu) / 10**12 / gain + Fraction(1, 10**12)
        assert found >= meeting / gain * (1 - slack) and found - 1 <= meeting / gain * (1 + slack)
    else:
        assert gain < Fraction(n_bytes, cpu) / 10**12


def test_measuring(monkeypatch):
    asked = []
    monkeypatch.setattr(jit, "read_bandwidth", lambda threads: asked.append(threads) or 5e10)
    found = measure_hardware(2, "RTX 3090")
    assert asked == [2] and found.cpu_bytes_per_second == 5e10 and found.measured == ("cpu_bytes_per_second",)
    assert (found.gpu, found.gpu_bytes_per_second, found.vram_bytes) == ("rtx 3090", 936e9, 24 << 30)
    assert found.sync_seconds == SYNC_SECONDS and found.cpu.endswith("2 threads")
    assert USUAL_GPU in GPUS
    with pytest.raises(InputError, match="known are rtx 2080 ti, "):
        measure_hardware(2, "voodoo")


def test_a_file_gives_back_what_was_written(tmp_path):
    path = tmp_path / "machine.json"
    path.write_text("old")
    write_hardware(path, MACHINE)
    assert read_hardware(path) == MACHINE
    assert [each.name for each in tmp_path.iterdir()] == ["machine.json"]
    with pytest.raises(InputError, match="cannot be written"):
        write_hardware(tmp_path / "none" / "machine.json", MACHINE)


def test_a_file_written_by_hand_needs_the_numbers_only():
    figures = {
        name: value for name, value in MACHINE.to_dict().items() if name not in ("cpu", "gpu", "measured")
    }
    found = hardware_from_dict(figures, "by hand")
    assert (found.cpu, found.gpu, found.measured) == ("", "", ())
    assert found.least_neurons(6912) == MACHINE.least_neurons(6912)


NUMBERS = ("cpu_bytes_per_second", "gpu_bytes_per_second", "sync_seconds", "vram_bytes")
BAD = (float("nan"), float("inf"), 0, -1, True, None, "fast", [1], 10**30, 10**400)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", BAD, ids=lambda value: str(value)[:8])
def test_a_bad_number_is_named(name, value, tmp_path):
    path = tmp_path / "machine.json"
    path.write_text(json.dumps({**MACHINE.to_dict(), name: value}))
    with pytest.raises(FormatError, match=rf"machine\.json: {name} is .*expected a number above 0"):
        read_hardware(path)


@pytest.mark.parametrize("name", NUMBERS)
def test_a_missing_number_is_named(name):
    figures = MACHINE.to_dict()
    del figures[name]
    with pytest.raises(FormatError, match=f"^here: {name} is missing"):
        hardware_from_dict(figures, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pyinfer_hardware": 2}, "pyinfer_hardware is 2, expected 1; measure again"),
        ({"pyinfer_hardware": True}, "pyinfer_hardware is True"),
        ({"vram_bytes": 0.5}, "vram_bytes is 0.5"),
        ({"gpu": 5}, "gpu is no name"),
        ({"cpu": "x" * 201}, "cpu is no name"),
        ({"gpu": "\x1b[2J"}, "gpu is no name"),
        ({"measured": "cpu"}, "measured is no list"),
        ({"measured": ["weather"]}, "measured is no list"),
        ({"measured": [["cpu_bytes_per_second"]]}, "measured is no list"),
    ],
)
def test_other_bad_figures_are_named(change, message):
    with pytest.raises(FormatError, match=f"^here: {message}"):
        hardware_from_dict({**MACHINE.to_dict(), **change}, "here")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"{", "is no JSON"),
        (b"[" * 60_000, "is no JSON"),
        (b"1" * 5000, "is no JSON"),
        (b"[]", "has no key pyinfer_hardware"),
        (b"{}", "has no key pyinfer_hardware"),
        (b" " * 70_000, "has more than 65536 bytes"),
    ],
    ids=lambda value: str(value)[:16],
)
def test_a_file_that_holds_no_figures(content, message, tmp_path):
    path = tmp_path / "machine.json"
    path.write_bytes(content)
    with pytest.raises(FormatError, match=message):
        read_hardware(path)


def test_no_file(tmp_path):
    with pytest.raises(ModelNotFoundError, match="expected a file of pyinfer-bench --hardware"):
        read_hardware(tmp_path / "none.json")
    with pytest.raises(ModelNotFoundError):
        read_hardware(tmp_path)
