"""pyinfer-convert place: what it says, what it writes, and what it does with bad input."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from pyinfer import jit
from pyinfer.gguf_file import open_gguf
from pyinfer.neurons.hardware import Hardware, write_hardware
from pyinfer.neurons.placement import Placement
from pyinfer.neurons.profile import Profile
from pyinfer.section import read_section, update_section
from pyinfer_convert.cli_place import SizeType, place

GOLDEN = Path(__file__).parents[1] / "golden" / "llama.gguf"
LAYERS, NEURONS, TOKENS = 2, 96, 1000
MACHINE = Hardware("a CPU", "a GPU", 50e9, 1000e9, 1e-7, 24 << 30, ("cpu_bytes_per_second",))


def counts_of(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, TOKENS, (LAYERS, NEURONS))


@pytest.fixture
def model(tmp_path):
    """A model with a profile."""
    path = tmp_path / "model.gguf"
    shutil.copy(GOLDEN, path)
    update_section(path, profile=Profile(counts_of(), TOKENS, [], None, "relu").to_entry())
    return path


@pytest.fixture
def machine(tmp_path):
    path = tmp_path / "machine.json"
    write_hardware(path, MACHINE)
    return path


def run(*arguments, code=0):
    done = CliRunner().invoke(place, [str(each) for each in arguments])
    assert done.stdout == "" and done.exit_code == code, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def placement_in(path) -> Placement | None:
    with open_gguf(path) as file:
        section = read_section(file)
    entry = section.entries.get("placement")
    return Placement.from_entry(entry, LAYERS, NEURONS) if entry else None


def test_a_placement_is_shown_and_written(model, machine):
    body = GOLDEN.read_bytes()
    said = run(model, "--vram", "3MiB", "--ctx", 64, "--hardware", machine)
    written = placement_in(model)
    assert written.hot.all() and written.objective == counts_of().sum() and written.hardware == MACHINE
    assert model.read_bytes()[: len(body)] == body
    lines = said.splitlines()
    assert "all          192    100.0%       100.0%" in said
    assert any(line.split() == ["neurons", "144.0", "KiB"] for line in lines)
    assert any(line.split()[:2] == ["kv", "cache"] for line in lines)
    assert (
        f"objective {written.objective} by exact, greedy {written.objective}" in said
        and "gap 0.00e+00" in said
    )
    assert "in its section" in lines[-1]


def test_the_profile_stays_and_the_placement_is_replaced(model, machine):
    run(model, "--vram", "3MiB", "--ctx", 64, "--hardware", machine)
    run(model, "--vram", "450KiB", "--ctx", 64, "--hardware", machine, "--solver", "greedy")
    found = placement_in(model)
    assert 0 < found.hot.sum() < found.hot.size and found.solver == "greedy"
    assert sum(found.n_bytes.values()) <= found.budget_bytes == 450 << 10
    with open_gguf(model) as file:
        section = read_section(file)
    profile = Profile.from_entry(section.entries["profile"], LAYERS, NEURONS)
    assert (profile.counts == counts_of()).all() and profile.tokens == TOKENS


def test_dry_run_writes_nothing(model, machine):
    before = model.read_bytes()
    said = run(model, "--vram", "3MiB", "--hardware", machine, "--dry-run")
    assert "nothing was written" in said and "objective" in said
    assert model.read_bytes() == before


def test_without_figures_the_machine_is_measured(model, monkeypatch):
    monkeypatch.setattr(jit, "read_bandwidth", lambda threads: 1e9 * threads)
    said = run(model, "--vram", "3MiB", "--threads", 3, "--gpu", "RTX 3090")
    assert "measuring" in said and "CPU 3.0 GB/s (measured), rtx 3090 936 GB/s (not measured)" in said
    assert placement_in(model).hardware.cpu_bytes_per_second == 3e9


@pytest.mark.parametrize("vram", ["0", "0 GiB", "100"])
def test_no_room_on_a_gpu_is_a_placement_for_the_cpu(model, machine, vram):
    said = run(model, "--vram", vram, "--hardware", machine)
    expected = (
        "--vram is 0: nothing is on a GPU" if vram != "100" else "the budget of 100 B is less than the "
    )
    assert f"note: {expected}" in said and "at least half of the tokens" in said
    found = placement_in(model)
    assert found.processor == "cpu" and found.resident == ()
    assert (found.hot.sum(1) % 16 == 0).all() and (counts_of()[found.hot] >= TOKENS / 2).all()
    assert found.hot.any()


def test_a_budget_below_the_attention_is_said(model, machine):
    said = run(model, "--vram", "200KiB", "--ctx", 64, "--hardware", machine)
    assert "note: the budget of 200.0 KiB holds the attention and KV cache of 1 of 2 layers" in said
    assert placement_in(model).processor == "gpu"


def test_more_memory_than_the_card_has_is_refused(model, machine, monkeypatch):
    said = run(model, "--vram", "25GiB", "--hardware", machine, code=1)
    assert said == "error: --vram is 25.0 GiB, but a GPU has 24.0 GiB\n"
    monkeypatch.setattr(jit, "read_bandwidth", lambda threads: 1e10)
    assert "rtx 3090 has 24.0 GiB" in run(model, "--vram", "25GiB", "--gpu", "rtx 3090", code=1)
    # The usual card is a guess: its memory says nothing about this machine.
    assert "in its section" in run(model, "--vram", "25GiB")


def test_a_model_without_a_profile(tmp_path, machine):
    path = tmp_path / "plain.gguf"
    shutil.copy(GOLDEN, path)
    said = run(path, "--vram", "1GiB", "--hardware", machine, code=1)
    assert (
        said.startswith("error: plain.gguf: has no profile") and "pyinfer-convert profile plain.gguf" in said
    )
    assert path.read_bytes() == GOLDEN.read_bytes()


def test_a_profile_without_counts(model, machine):
    empty = Profile(np.zeros((LAYERS, NEURONS), np.int64), TOKENS, [], None, "silu")
    update_section(model, profile=empty.to_entry())
    said = run(model, "--vram", "1GiB", "--hardware", machine, code=1)
    assert "activation silu" in said and "runs without a placement" in said


def test_a_profile_of_other_sizes(model, machine):
    other = Profile(np.ones((LAYERS, NEURONS + 1), np.int64), TOKENS, [], None, "relu")
    update_section(model, profile=other.to_entry())
    said = run(model, "--vram", "1GiB", "--hardware", machine, code=1)
    assert said.startswith("error: model.gguf: ") and "counts is int64 [2, 97]" in said


def test_bad_figures_and_missing_files(model, machine, tmp_path):
    machine.write_text(json.dumps({**replace(MACHINE).to_dict(), "sync_seconds": 0}))
    assert "sync_seconds is 0" in run(model, "--vram", "1GiB", "--hardware", machine, code=1)
    assert "cannot be read" in run(model, "--vram", "1GiB", "--hardware", tmp_path / "none", code=1)
    assert "no such file" in run(tmp_path / "none.gguf", "--vram", "1GiB", code=1)
    assert "is not known" in run(model, "--vram", "1GiB", "--gpu", "voodoo", code=1)
    assert "--gpu is for" in run(model, "--vram", "1GiB", "--gpu", "t4", "--hardware", machine, code=1)
    assert placement_in(model) is None


def test_a_damaged_section_is_named_and_stays(model, machine):
    data = bytearray(model.read_bytes())
    data[-200] ^= 1
    model.write_bytes(data)
    said = run(model, "--vram", "1GiB", "--hardware", machine, code=1)
    assert said.startswith("error: model.gguf: ") and said.count("\n") == 1
    assert model.read_bytes() == data


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("8GiB", 8 << 30),
        ("8 gib", 8 << 30),
        ("1.5GB", 1_500_000_000),
        ("512MiB", 512 << 20),
        ("3KB", 3000),
        ("12345", 12345),
        ("0", 0),
        ("0.5KiB", 512),
    ],
)
def test_sizes(text, n_bytes):
    assert SizeType().convert(text, None, None) == n_bytes


@pytest.mark.parametrize(
    "text", ["", "8G", "-1", "8 apples", "nan", "1e9", "2000TiB", "9" * 500, "GiB", "1.GiB"]
)
def test_what_is_no_size_is_wrong_usage(model, text):
    said = run(model, "--vram", text, code=2)
    assert "is no size" in said or "more memory than any machine" in said or "No such option" in said


def test_wrong_usage(model, machine):
    run(model, code=2)
    run(model, "--vram", "1GiB", "--ctx", "0", code=2)
    run(model, "--vram", "1GiB", "--solver", "magic", code=2)
    run(model, "--vram", "1GiB", "--time-limit", "0", code=2)
    assert "expected more than 0" in run(
        model, "--vram", "1GiB", "--hardware", machine, "--time-limit", "nan", code=1
    )
