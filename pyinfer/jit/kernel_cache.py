"""Where machine code is kept between processes: one checked file per compiled function and signature.

Numba's own cache serves stale code when a helper in another file is edited, believes damaged files, and lets
two processes give one file name to different code (its index is read and written back). Here the folder is
stamped with all kernel sources, a file's name is a digest of all that the code depends on, and its content
carries a checksum.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import pickle
import uuid
from functools import cache
from pathlib import Path

import llvmlite
import numba
from numba.core import caching
from numba.core.serialize import dumps

from pyinfer import config
from pyinfer.jit.levels import level

COMPILED_PARTS = ("jit", "quants", "cpu")
SUFFIX = ".nbc"
CHECKSUM_BYTES = hashlib.sha256().digest_size


@cache
def _digest_of_sources() -> str:
    package = Path(__file__).parents[1]
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for part in COMPILED_PARTS:
        for path in sorted((package / part).glob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Folder of the compiled kernels of exactly these sources, these compilers and this SIMD level."""
    return config.cache_dir() / "kernels" / f"{_digest_of_sources()}-{level.get()}"


def kernel_cache_is_cold() -> bool:
    """True when the next run will have to compile (no kernel of this version is kept)."""
    return next(iter(cache_folder().glob(f"*{SUFFIX}")), None) is None


class _Locator:
    """Gives Numba's cache the few answers that it asks for; files are `_Files`' matter."""

    def __init__(self, function) -> None:
        self._name = function.__module__.replace(".", "-")

    def ensure_cache_path(self) -> None:
        cache_folder().mkdir(parents=True, exist_ok=True)

    def get_cache_path(self) -> str:
        return str(cache_folder())

    def get_source_stamp(self) -> str:
        return ""  # the folder's name says it

    def get_disambiguator(self) -> str:
        return self._name

    @classmethod
    def from_function(cls, function, file):
        return cls(function)


class _Impl(caching.CompileResultCacheImpl):
    _locator_classes = (_Locator,)


class _Files:
    """Takes the place of Numba's index and data files."""

    def __init__(self, base: str) -> None:
        self._base = base

    def _path(self, key) -> Path:
        return cache_folder() / f"{self._base}.{hashlib.sha256(repr(key).encode()).hexdigest()[:24]}{SUFFIX}"

    def load(self, key):
        """The compiled function; None when there is none or its file is damaged."""
        try:
            raw = self._path(key).read_bytes()
        except OSError:
            return None
        checksum, data = raw[:CHECKSUM_BYTES], raw[CHECKSUM_BYTES:]
        return pickle.loads(data) if hashlib.sha256(data).digest() == checksum else None

    def save(self, key, compiled) -> None:
        """Write under a temporary name and rename: a reader sees a whole file or none."""
        path = self._path(key)
        data = dumps(compiled)
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            temporary.write_bytes(hashlib.sha256(data).digest() + data)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise

    def flush(self) -> None:
        """Nothing is kept in memory."""


class KernelCache(caching.FunctionCache):
    """Numba's cache over our files; a full or unwritable disk means compiling again next time."""

    _impl_class = _Impl

    def __init__(self, function) -> None:
        super().__init__(function)
        self._cache_file = _Files(self._impl.filename_base)

    def save_overload(self, sig, data) -> None:
        with contextlib.suppress(OSError):
            super().save_overload(sig, data)
