"""The benchmark of feed-forward layers runs, and says what it is asked."""

from __future__ import annotations

import re

from click.testing import CliRunner

from pyinfer_tools.bench_ffn import main, measure


def test_both_kinds_are_timed():
    found = measure(128, 192, 0.2, 3, 2, 2, 2)
    assert set(found) == {"dense", "sparse"}
    assert all(len(each) == 2 and min(each) > 0 for each in found.values())


def test_the_table():
    result = CliRunner().invoke(main, ["--width", "64", "--neurons", "64", "--layers", "1", "--repeats", "1"])
    assert result.exit_code == 0, result.output
    assert re.search(r"dense .* us a layer .* GB/s\nsparse .*\nratio +\d+\.\d\d", result.output)


def test_odd_sizes_are_refused():
    result = CliRunner().invoke(main, ["--width", "100"])
    assert result.exit_code == 2 and "multiples of 64" in result.output
