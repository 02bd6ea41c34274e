"""Compiled kernels on disk: used again, never stale, never believed when damaged, never needed.

Each case is a process of its own with a cache folder of its own, as a user's next start would be.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import pyinfer
from pyinfer import config
from pyinfer.jit import levels

# One kernel and the routines of the team, on one file: unpack Q8_0 from argv[1], say what the cache did.
SCRIPT = """
import json, sys
import numpy as np
from pyinfer.jit.kernel_cache import cache_folder, kernel_cache_is_cold
cold = kernel_cache_is_cold()
from pyinfer.cpu.team_program import single_instruction
from pyinfer.jit import team
from pyinfer.jit.levels import level
from pyinfer.quants import panels, q8_0
blocks = np.load(sys.argv[1])
rows, columns = len(blocks), blocks.shape[1] // 34 * 32
out = np.zeros(q8_0.LAYOUT.matrix_bytes(rows, columns), np.uint8)
stride = q8_0.LAYOUT.panel_bytes(columns)
operands = np.array([blocks.ctypes.data, out.ctypes.data, rows, columns, stride], np.int64)
made = team.Team(1)
made.run(single_instruction(q8_0.pack, operands, panels.panels_of(rows)), np.zeros(1, np.int64))
made.close()
hits = q8_0.pack._compiled[level.get()].cache_hits + sum(team._lead.stats.cache_hits.values())
np.save(sys.argv[2], panels.values(q8_0.LAYOUT, out, rows, columns).astype(np.float32))
print(json.dumps({"cold": cold, "hits": hits, "folder": str(cache_folder())}))
"""
COMPILED = 2  # q8_0.pack and the team's _lead


@pytest.fixture(scope="module")
def blocks(tmp_path_factory):
    """A file of Q8_0 rows, and their values by the gguf package."""
    values = np.random.default_rng(6).standard_normal((20, 128)).astype(np.float32)
    made = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
    path = tmp_path_factory.mktemp("blocks") / "q8_0.npy"
    np.save(path, made)
    return path, gguf.quants.dequantize(made, gguf.GGMLQuantizationType.Q8_0)


def command(blocks, out: Path, before: str = "") -> list[str]:
    return [sys.executable, "-c", before + SCRIPT, str(blocks[0]), str(out)]


def environment(cache: Path) -> dict[str, str]:
    return config.child_environment(PYINFER_CACHE_DIR=str(cache))


def run(blocks, cache: Path, tmp_path: Path, before: str = "") -> dict:
    """What the process says; its values must be right."""
    out = tmp_path / "values.npy"
    done = subprocess.run(
        command(blocks, out, before), env=environment(cache), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    np.testing.assert_array_equal(np.load(out), blocks[1])
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def warm(blocks, tmp_path_factory):
    """A cache folder filled by one process."""
    cache = tmp_path_factory.mktemp("warm")
    said = run(blocks, cache, tmp_path_factory.mktemp("out"))
    assert said["cold"] and said["hits"] == 0
    return cache


@pytest.fixture
def cache(warm, tmp_path):
    """A filled cache folder to spoil."""
    return Path(shutil.copytree(warm, tmp_path / "cache"))


def files(cache: Path) -> dict[str, bytes]:
    return {
        path.relative_to(cache).as_posix(): path.read_bytes() for path in cache.rglob("*") if path.is_file()
    }


def test_the_next_process_compiles_nothing(blocks, cache, tmp_path):
    before = files(cache)
    assert len([name for name in before if name.endswith(".nbc")]) == COMPILED
    said = run(blocks, cache, tmp_path)
    assert not said["cold"] and said["hits"] == COMPILED
    assert files(cache) == before


def _flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes(byte ^ 0x5A for byte in data[middle : middle + 64]) + data[middle + 64 :]


def _one_bit_of_code(data: bytes) -> bytes:
    """A pickle of machine code stays a pickle; only the code is another."""
    code = max(data.find(magic) for magic in (b"\x7fELF", b"\xcf\xfa\xed\xfe", b"\x64\x86")) + 300
    return data[:code] + bytes([data[code] ^ 8]) + data[code + 1 :]


DAMAGES = {
    "empty": lambda data: b"",
    "cut": lambda data: data[: len(data) // 2],
    "one byte short": lambda data: data[:-1],
    "zeros": lambda data: bytes(len(data)),
    "a page of zeros": lambda data: (
        data[: len(data) // 4] + bytes(len(data) // 2) + data[len(data) * 3 // 4 :]
    ),
    "noise": lambda data: np.random.default_rng(7).bytes(len(data)),
    "flipped bits": _flip,
    "one bit of code": _one_bit_of_code,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_files_are_compiled_again_and_replaced(blocks, cache, tmp_path, damage):
    """What was damaged must neither run nor stay."""
    for path in cache.rglob("*.nbc"):
        path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert run(blocks, cache, tmp_path)["hits"] == 0
    assert run(blocks, cache, tmp_path)["hits"] == COMPILED


def test_missing_machine_code_is_made_again(blocks, cache, tmp_path):
    for path in cache.rglob("*.nbc"):
        path.unlink()
    assert run(blocks, cache, tmp_path)["hits"] == 0
    assert run(blocks, cache, tmp_path)["hits"] == COMPILED


def test_without_a_place_to_write_everything_still_works(blocks, tmp_path):
    taken = tmp_path / "file"
    taken.write_text("a file where the folder should be")
    for _ in range(2):
        assert run(blocks, taken / "cache", tmp_path)["hits"] == 0
    assert taken.read_text() == "a file where the folder should be"


def test_a_full_disk_leaves_no_rubbish(blocks, tmp_path):
    pytest.importorskip("resource", reason="the limit that stands for a full disk is POSIX's")
    full = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (12000, 12000))\n"
    cache = tmp_path / "cache"
    assert run(blocks, cache, tmp_path, full)["hits"] == 0
    assert not [name for name in files(cache) if ".tmp" in name]
    assert run(blocks, cache, tmp_path)["hits"] < COMPILED
    assert run(blocks, cache, tmp_path)["hits"] == COMPILED


def test_two_first_starts_at_once(blocks, tmp_path):
    cache, outs = tmp_path / "cache", [tmp_path / f"{number}.npy" for number in (0, 1)]
    started = [
        subprocess.Popen(
            command(blocks, out), env=environment(cache), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        for out in outs
    ]
    for process, out in zip(started, outs):
        _, complaint = process.communicate(timeout=120)
        assert process.returncode == 0, complaint
        np.testing.assert_array_equal(np.load(out), blocks[1])
    assert run(blocks, cache, tmp_path)["hits"] == COMPILED


def test_editing_any_compiled_source_changes_the_folder(tmp_path):
    """Also a helper in another file than the kernel, which stock Numba would not notice."""
    package = shutil.copytree(
        Path(pyinfer.__file__).parent, tmp_path / "pyinfer", ignore=shutil.ignore_patterns("__pycache__")
    )
    line = "from pyinfer.jit.kernel_cache import cache_folder; print(cache_folder())"

    def folder(**changes: str) -> str:
        made = config.child_environment(
            PYINFER_CACHE_DIR=str(tmp_path / "cache"), PYTHONPATH=str(tmp_path), **changes
        )
        command = [sys.executable, "-c", line]
        done = subprocess.run(
            command, env=made, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120
        )
        return done.stdout

    best, portable = levels.available()[0], folder(PYINFER_SIMD="portable")
    seen = [folder(PYINFER_SIMD=best)]
    assert seen[0] == folder(PYINFER_SIMD=best)
    assert (seen[0] == portable) == (best == "portable")
    for edited in ("jit/memory.py", "quants/panels.py", "cpu/math.py"):
        with (package / edited).open("a", encoding="utf-8") as file:
            file.write("\n# another line\n")
        seen.append(folder(PYINFER_SIMD=best))
    assert len(set(seen)) == len(seen)
