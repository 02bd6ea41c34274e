"""How Python becomes machine code.

A *kernel* is a module-level function (operands, step, first, last, thread) -> None of int64 that never
raises; a program holds its address. `inline` marks its helpers, `routine` the few functions that Python calls
directly.
"""

from __future__ import annotations

import threading

import numba
from numba import types
from numba.core.ccallback import CFunc
from numba.core.compiler import Compiler

from pyinfer.jit.kernel_cache import KernelCache
from pyinfer.jit.levels import level

FASTMATH = {"nsz", "arcp", "contract", "afn", "reassoc"}  # never nnan or ninf: masks use -inf
OPTIONS = {"nopython": True, "error_model": "numpy", "fastmath": FASTMATH}
SIGNATURE = types.void(*([types.int64] * 5))

inline = numba.njit(forceinline=True, error_model="numpy", fastmath=FASTMATH)

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
                compiled._cache = KernelCache(self.function)
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
    dispatcher._cache = KernelCache(function)
    return dispatcher
