"""Taking turns, ratios, and processes that end: with made-up workers, so that no engine is needed."""

from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from click.testing import CliRunner

from pyinfer_tools import versus
from pyinfer_tools.golden import rotated_pairs
from pyinfer_tools.random_model import SHAPES, write_random_model
from pyinfer_tools.random_sparse import SHAPES as SPARSE_SHAPES
from pyinfer_tools.random_sparse import write_random_sparse


class _Made:
    """A worker with given speeds."""

    def __init__(self, label, speeds, log):
        self.label, self._speeds, self._log = label, list(speeds), log

    def speed(self, work, tokens, limit_seconds=None, batch=1):
        self._log.append((self.label, work, tokens, limit_seconds, batch))
        return self._speeds.pop(0)


def test_engines_take_turns_and_pairs_make_ratios():
    log = []
    workers = [_Made("pyinfer", [1, 30, 10, 40], log), _Made("llama.cpp", [1, 10, 10, 10], log)]
    result = versus.compare(workers, "decode", 64, 3, 20.0)
    assert [label for label, *_ in log] == ["pyinfer", "llama.cpp"] * 4
    assert [tokens for _, _, tokens, _, _ in log] == [8, 8] + [64] * 6
    assert {limit for *_, limit, _ in log} == {20.0}
    assert result["tokens_per_second"] == {"pyinfer": 30, "llama.cpp": 10}
    assert [result[f"ratio_{kind}"] for kind in ("min", "median", "max")] == [1, 3, 4]


def test_sparse_meets_dense(tmp_path):
    sparse, dense = tmp_path / "sparse.gguf", tmp_path / "dense.gguf"
    write_random_sparse(sparse, SPARSE_SHAPES["tiny"], "q4_0")
    write_random_model(dense, SHAPES["tiny"], "q4_0")
    arguments = ["-m", str(sparse), "--sparsity", "exact", "--peer", "pyinfer", "--peer-model", str(dense)]
    arguments += ["--batch", "1", "--batch", "3", "-p", "5", "-n", "4", "-r", "2"]
    found = CliRunner().invoke(versus.main, [*arguments, "--json"])
    assert found.exit_code == 0, found.stderr
    compared = json.loads(found.stdout)
    assert [(each["work"], each["batch"]) for each in compared["results"]] == [
        ("prefill", 1),
        ("decode", 1),
        ("decode", 3),
    ]
    assert compared["models"] == {"pyinfer": str(sparse), "pyinfer dense": str(dense)}
    assert compared["builds"]["pyinfer"].endswith("exact")
    assert compared["builds"]["pyinfer dense"].endswith("dense")
    text = versus.report(compared)
    assert "sparse.gguf and dense.gguf" in text and "decode     4 x3   pyinfer" in text


def test_a_batch_is_for_pyinfer_only(tmp_path):
    (tmp_path / "model.gguf").touch()
    found = CliRunner().invoke(versus.main, ["-m", str(tmp_path / "model.gguf"), "--batch", "4"])
    assert found.exit_code == 2 and "--peer pyinfer" in found.stderr


def test_a_worker_that_cannot_start_says_why(tmp_path):
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\xff" * 60)
    with pytest.raises(versus.WorkerError, match=r"^pyinfer: .*bad\.gguf"):
        versus.Worker(versus.Side("pyinfer", "pyinfer", str(tmp_path / "bad.gguf")), 64, 1)


def test_the_busy_process_ends():
    with versus.busy_core() as process:
        assert process.poll() is None
    assert process.poll() is not None


def test_the_busy_loop_ends_with_its_parent():
    process = subprocess.Popen([sys.executable, "-c", versus._BUSY_LOOP], stdin=subprocess.PIPE)
    process.stdin.close()
    assert process.wait(30) == 0


def test_peak_memory_grows_with_use():
    """In a process of its own: the peak of this one may be gigabytes."""
    code = """
import numpy as np
from pyinfer_tools.memory import peak_memory_bytes
before = peak_memory_bytes()
block = np.ones(4 * before // 8, np.float64)
assert peak_memory_bytes() >= before + block.nbytes // 2
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_rotated_pairs_make_neighbours_of_rope_pairs():
    heads, size, position = 3, 8, 5
    random = np.random.default_rng(2)
    weight, x = random.standard_normal((heads * size, 10)), random.standard_normal(10)
    angle = position * 0.9 ** np.arange(size // 2)
    # Hugging Face turns (i, i + C/2), llama-architecture files turn (2i, 2i + 1).
    halves = (weight @ x).reshape(heads, 2, size // 2)
    expected = halves[:, 0] * np.cos(angle) - halves[:, 1] * np.sin(angle)
    pairs = (rotated_pairs(weight, heads) @ x).reshape(heads, size // 2, 2)
    found = pairs[..., 0] * np.cos(angle) - pairs[..., 1] * np.sin(angle)
    np.testing.assert_allclose(found, expected)
    bias = random.standard_normal(heads * size)
    np.testing.assert_array_equal(rotated_pairs(bias, heads), rotated_pairs(bias[:, None], heads)[:, 0])
