"""Which SIMD instructions the kernels may use: decided once, from the CPU features that LLVM will really
compile for.

A target intrinsic outside the effective features aborts the process, so Numba's own overrides
(NUMBA_CPU_FEATURES) count, not what the host could do. PYINFER_SIMD (see `pyinfer.config`) chooses a lower
level by name.
"""

from __future__ import annotations

import platform

from llvmlite import binding
from numba.core import config as numba_config

from pyinfer import config
from pyinfer.errors import InputError

X86_NEEDS = {
    "avx512vnni": ("avx512f", "avx512bw", "avx512vl", "avx512vnni", "fma", "f16c"),
    "avxvnni": ("avx2", "avxvnni", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
}
ARM_NEEDS = {"neondot": ("dotprod",)}
NAMES = (*X86_NEEDS, *ARM_NEEDS, "portable")

# Tokens that a GEMM tile takes, for a few rows and for many: what the registers hold twice (integers and
# totals of 16 lanes). u4, TOPS per thread of a Zen 5 core by tile: avx512vnni 8: 0.81; avxvnni 2: 0.41, 4:
# 0.43, 8: 0.20; avx2 2: 0.20, 4: 0.24, 8: 0.23.
TILES = {"avx512vnni": (4, 8), "avxvnni": (4, 4), "avx2": (4, 4), "neondot": (2, 2), "portable": (4, 8)}


def effective_features() -> set[str]:
    """Names of the CPU features that Numba compiles for in this process."""
    text = numba_config.CPU_FEATURES
    if text is None and numba_config.CPU_NAME not in (None, "", "host"):
        return set()  # a foreign CPU name without features: nothing can be assumed
    if text is None:
        try:
            return {name for name, on in binding.get_host_cpu_features().items() if on}
        except RuntimeError:  # LLVM cannot tell on this host
            return set()
    return {part[1:] for part in text.split(",") if part.startswith("+")}


def available() -> tuple[str, ...]:
    """Levels that this process can run, best first; always ends with "portable"."""
    machine = platform.machine().lower()
    needs = (
        X86_NEEDS if machine in ("x86_64", "amd64") else ARM_NEEDS if machine in ("arm64", "aarch64") else {}
    )
    features = effective_features()
    if machine == "arm64" and platform.system() == "Darwin":
        features = features | {"dotprod"}  # every Apple M has it; older LLVMs do not list it
    return (*(name for name, wanted in needs.items() if features.issuperset(wanted)), "portable")


class _Level:
    """The level that code generation uses now; tests force others."""

    def __init__(self) -> None:
        self._name: str | None = None

    def get(self) -> str:
        if self._name is None:
            self.set(config.simd_level() or available()[0])
        assert self._name is not None
        return self._name

    def set(self, name: str) -> None:
        if name not in available():
            raise InputError(
                f"PYINFER_SIMD={name!r} is not one of {', '.join(available())} (what this processor has)"
            )
        self._name = name


level = _Level()
