"""Which SIMD level is chosen: from the features that are compiled for, never from what the host could do."""

from __future__ import annotations

import platform
import subprocess
import sys

import numpy as np
import pytest
from sparse_files import sparse_gguf

from pyinfer import config
from pyinfer.errors import InputError
from pyinfer.jit import levels
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session

X86 = platform.machine().lower() in ("x86_64", "amd64")
V3 = "+avx,+avx2,+fma,+f16c"


@pytest.fixture
def fresh():
    return levels._Level()


def _effective(monkeypatch, features, cpu=None, machine="x86_64", system="Linux"):
    monkeypatch.setattr(levels.numba_config, "CPU_FEATURES", features)
    monkeypatch.setattr(levels.numba_config, "CPU_NAME", cpu)
    monkeypatch.setattr(levels.platform, "machine", lambda: machine)
    monkeypatch.setattr(levels.platform, "system", lambda: system)
    return levels.available()


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        ("", ("portable",)),
        ("+sse4.2,-avx2", ("portable",)),
        ("+avx2,+fma", ("portable",)),
        (V3, ("avx2", "portable")),
        (V3 + ",-avxvnni", ("avx2", "portable")),
        (V3 + ",+avxvnni", ("avxvnni", "avx2", "portable")),
        (V3 + ",+avx512f,+avx512bw,+avx512vl", ("avx2", "portable")),
        (V3 + ",+avx512f,+avx512bw,+avx512vl,+avx512vnni", ("avx512vnni", "avx2", "portable")),
    ],
)
def test_levels_follow_the_features_that_are_compiled_for(monkeypatch, features, expected):
    assert _effective(monkeypatch, features) == expected


def test_a_foreign_processor_without_features_is_portable(monkeypatch):
    assert _effective(monkeypatch, None, cpu="x86-64") == ("portable",)


def test_arm_levels(monkeypatch):
    assert _effective(monkeypatch, "+neon,+dotprod", machine="aarch64") == ("neondot", "portable")
    assert _effective(monkeypatch, "+neon", machine="aarch64") == ("portable",)
    assert _effective(monkeypatch, "+neon", machine="arm64", system="Darwin") == ("neondot", "portable")
    assert _effective(monkeypatch, V3, machine="riscv64") == ("portable",)


def test_without_knowledge_of_the_host_everything_is_portable(monkeypatch):
    def unknown():
        raise RuntimeError("no host")

    monkeypatch.setattr(levels.binding, "get_host_cpu_features", unknown)
    assert _effective(monkeypatch, None) == ("portable",)


def test_the_best_level_is_the_default_and_a_lower_one_can_be_chosen(monkeypatch, fresh):
    monkeypatch.delenv("PYINFER_SIMD", raising=False)
    assert fresh.get() == levels.available()[0]
    monkeypatch.setenv("PYINFER_SIMD", "Portable")
    assert levels._Level().get() == "portable"


def test_an_unknown_level_is_refused_with_the_known_ones(monkeypatch, fresh):
    monkeypatch.setenv("PYINFER_SIMD", "mmx")
    with pytest.raises(InputError, match=r"mmx.*portable"):
        fresh.get()


def test_a_level_of_another_processor_is_refused(fresh):
    with pytest.raises(InputError, match="neondot" if X86 else "avx2"):
        fresh.set("neondot" if X86 else "avx2")


OLD_PROCESSOR = """
import sys
import numpy as np
from pyinfer.jit.levels import level
from pyinfer.runtime.loader import load_model
from pyinfer.runtime.session import Session

with load_model(sys.argv[1]) as model:
    session = Session(model, 64, 1)
    logits = session.prefill(np.load(sys.argv[2])["tokens"], all_logits=True)
    session.close()
assert level.get() == "portable", level.get()
np.save(sys.argv[3], logits)
"""


def _on_an_old_processor(folder, path, tokens) -> np.ndarray:
    """Logits of a process for which no extension of the processor is there."""
    environment = config.child_environment(
        NUMBA_CPU_NAME="x86-64", NUMBA_CPU_FEATURES="", PYINFER_CACHE_DIR=str(folder / "cache")
    )
    environment.pop("PYINFER_SIMD", None)
    given, out = folder / "tokens.npz", folder / "logits.npy"
    np.savez(given, tokens=tokens)
    arguments = [sys.executable, "-c", OLD_PROCESSOR, str(path), str(given), str(out)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return np.load(out)


@pytest.mark.skipif(not X86, reason="names an x86 processor; every ARM processor converts halves itself")
def test_a_processor_without_any_extension_runs_a_model(tmp_path, golden):
    """No AVX, and no conversion of halves: words that the processor lacks must not end the process."""
    case = golden("llama")
    found = _on_an_old_processor(tmp_path, case.path, np.load(case.path.with_suffix(".npz"))["tokens"][:5])
    assert np.abs(found - case.logits[:5]).max() < 3e-3 * np.abs(case.logits).max()


@pytest.mark.skipif(not X86, reason="names an x86 processor; every ARM processor converts halves itself")
def test_it_runs_a_sparse_model(tmp_path):
    """Many rows, whose output weights are quantized on the way."""
    path, tokens = sparse_gguf(tmp_path / "model.gguf", "relu_llama", "q8_0"), np.arange(3, 27)
    found = _on_an_old_processor(tmp_path, path, tokens)
    with load_model(path) as model:
        session = Session(model, 64, 1)
        expected = session.prefill(tokens, all_logits=True)
        session.close()
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()
