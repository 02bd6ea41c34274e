"""The one place that says how Python becomes machine code, and where the machine code is kept.

A *kernel* is a module-level function (operands, step, first, last, thread) -> None of int64 that never
raises; a program holds its address. `inline` marks its helpers, `routine` the few functions that Python calls
directly. The disk cache is stamped with all kernel sources and the SIMD level, because stock Numba serves
stale code when a helper in another file is edited.
"""

from __future__ import annotations

import contextlib
import hashlib
import threading
from pathlib import Path

import numba
from numba import types
from numba.core import caching
from numba.core.ccallback import CFunc
from numba.core.compiler import Compiler

from pyinfer import config
from pyinfer.jit.levels import level

FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}  # never nnan or ninf: masks use -inf
OPTIONS = {"nopython": True, "error_model": "numpy", "fastmath": FASTMATH}
SIGNATURE = types.void(*([types.int64] * 5))
COMPILED_PARTS = ("jit", "quants", "cpu")

inline = numba.njit(forceinline=True, error_model="numpy", fastmath=FASTMATH)


def _digest_of_sources() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for part in COMPILED_PARTS:
        for path in sorted((package / part).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


class _Stamp:
    value: str | None = None

    @classmethod
    def get(cls) -> str:
        if cls.value is None:
            cls.value = _digest_of_sources()
        return f"{cls.value}-{level.get()}"


def cache_folder() -> Path:
    """Folder of the compiled kernels of exactly these sources and this SIMD level."""
    return config.cache_dir() / "kernels" / _Stamp.get()


def kernel_cache_is_cold() -> bool:
    """True when the next run will have to compile (no kernel of this version is cached)."""
    return next(iter(cache_folder().glob("*.nbi")), None) is None


class _Locator:
    """Tells Numba's cache where a function's index and data lie."""

    def __init__(self, function) -> None:
        self._name = function.__module__.replace(".", "-")

    def ensure_cache_path(self) -> None:
        cache_folder().mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return _Stamp.get()

    def get_disambiguator(self) -> str:
        return self._name

    @classmethod
    def from_function(cls, function, file):
        return cls(function)


class _CacheImpl(caching.CompileResultCacheImpl):
    _locator_classes = (_Locator,)


class _Cache(caching.FunctionCache):
    """Numba's cache that takes a broken or unwritable disk as a miss."""

    _impl_class = _CacheImpl

    def load_overload(self, sig, target_context):
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # any pickle of a torn file can fail in any way; compiling again is always right
            with contextlib.suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig, data):
        with contextlib.suppress(
            OSError, EOFError, ValueError
        ):  # full or read-only disk: compile again next time
            try:
                super().save_overload(sig, data)
            except Exception as error:
                if isinstance(error, OSError):
                    raise
                self.flush()
                super().save_overload(sig, data)


_compiling = threading.RLock()


class Kernel:
    """A function to be compiled when a program first needs its address."""

    def __init__(self, function) -> None:
        self.function = function
        self.name = function.__name__
        self._compiled: dict[str, CFunc] = {}

    @property
    def address(self) -> int:
        """Address of the machine code; compiles or loads it at first."""
        key = level.get()
        with _compiling:
            if key not in self._compiled:
                compiled = CFunc(
                    self.function, (SIGNATURE.args, SIGNATURE.return_type), {}, OPTIONS, Compiler
                )
                compiled._cache = _Cache(self.function)
                compiled.compile()
                self._compiled[key] = compiled
            return self._compiled[key].address

    def assembly(self) -> str:
        """Machine code as text, to look at when a kernel misses its bound."""
        self.address  # noqa: B018
        return self._compiled[level.get()]._library.get_asm_str()


def kernel(function) -> Kernel:
    return Kernel(function)


def routine(function):
    """A compiled function that Python calls itself, without the GIL."""
    dispatcher = numba.njit(nogil=True, error_model="numpy", fastmath=FASTMATH)(function)
    dispatcher._cache = _Cache(function)
    return dispatcher
