"""pyinfer-bench --hardware: measures the machine and keeps the figures."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from pyinfer import jit
from pyinfer.neurons.hardware import hardware_from_dict, read_hardware
from pyinfer_tools import bench


@pytest.fixture
def run(monkeypatch):
    monkeypatch.setattr(jit, "read_bandwidth", lambda threads: 1e10 * threads)

    def invoke(*arguments, code=0):
        done = CliRunner().invoke(bench.main, [str(each) for each in arguments])
        assert done.exit_code == code, done.output
        return done.output

    return invoke


def test_figures_are_shown_and_kept(run, tmp_path):
    path = tmp_path / "machine.json"
    said = run("--hardware", "-o", path, "--threads", 2, "--gpu", "RTX 4090").splitlines()
    assert said[0].split()[-4:] == ["threads", "20.0", "GB/s", "measured"]
    assert said[1].split() == ["rtx", "4090", "1,008.0", "GB/s", "not", "measured"]
    found = read_hardware(path)
    assert found.cpu_bytes_per_second == 2e10 and found.gpu == "rtx 4090" and found.vram_bytes == 24 << 30


def test_figures_as_json(run):
    found = json.loads(run("--hardware", "--json", "--threads", 1))
    assert hardware_from_dict(found, "output").cpu_bytes_per_second == 1e10


def test_wrong_usage(run, tmp_path):
    assert "either a model (-m) or --hardware" in run(code=2)
    assert "either a model (-m) or --hardware" in run("-m", "x.gguf", "--hardware", code=2)
    assert "-o is for --hardware" in run("-m", "x.gguf", "-o", tmp_path / "figures", code=2)
    run("--hardware", "--gpu", "voodoo", code=2)
    said = run("--hardware", "-o", tmp_path / "none" / "machine.json", code=1)
    assert "machine.json: cannot be written" in said and "Traceback" not in said


def test_the_machine_reads_at_all():
    """The real measurement: slower than a disk or faster than any memory would be a fault."""
    assert 1e8 < jit.read_bandwidth(1) < 1e13
