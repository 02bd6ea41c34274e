"""Words for threads that share memory without the GIL: LLVM atomics on int64, a pause and a yield.

Orders are acquire/release; addresses are int64 and 8-byte aligned.
"""

from __future__ import annotations

import ctypes
import platform
import sys

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

I32, I64 = ir.IntType(32), ir.IntType(64)
YIELD, CLOCK = "pyinfer_yield_processor", "pyinfer_clock"
CLOCK_MONOTONIC = 6 if sys.platform == "darwin" else 1


def _register_symbols() -> None:
    """Give LLVM the operating system's "let another thread run" and its clock under one name on every
    platform.
    """
    if sys.platform == "win32":
        kernel32 = ctypes.windll.kernel32
        functions = {YIELD: kernel32.SwitchToThread, CLOCK: kernel32.QueryPerformanceCounter}
    else:
        libc = ctypes.CDLL(None)
        functions = {YIELD: libc.sched_yield, CLOCK: libc.clock_gettime}
    for name, function in functions.items():
        address = ctypes.cast(function, ctypes.c_void_p).value
        assert address is not None
        binding.add_symbol(name, address)


def _ticks_per_second() -> int:
    if sys.platform != "win32":
        return 1_000_000_000
    frequency = ctypes.c_int64()
    ctypes.windll.kernel32.QueryPerformanceFrequency(ctypes.byref(frequency))
    return frequency.value


_register_symbols()
TICKS_PER_SECOND = _ticks_per_second()


def _pointer(builder, address):
    return builder.inttoptr(address, I64.as_pointer())


@intrinsic
def atomic_add(typingctx, address, value):
    """Add and return the value before; with 0, a sequentially consistent load."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("add", _pointer(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_load(typingctx, address):
    def generate(context, builder, signature, args):
        return builder.load_atomic(_pointer(builder, args[0]), "acquire", 8)

    return types.int64(types.int64), generate


@intrinsic
def atomic_store(typingctx, address, value):
    def generate(context, builder, signature, args):
        builder.store_atomic(args[1], _pointer(builder, args[0]), "release", 8)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def atomic_exchange(typingctx, address, value):
    """Store and return the value before."""

    def generate(context, builder, signature, args):
        return builder.atomic_rmw("xchg", _pointer(builder, args[0]), args[1], "seq_cst")

    return types.int64(types.int64, types.int64), generate


@intrinsic
def atomic_replace(typingctx, address, expected, new):
    """Store `new` if the value is `expected`; says whether it did (sequentially consistent)."""

    def generate(context, builder, signature, args):
        pair = builder.cmpxchg(_pointer(builder, args[0]), args[1], args[2], "seq_cst", "seq_cst")
        return builder.extract_value(pair, 1)

    return types.boolean(types.int64, types.int64, types.int64), generate


@intrinsic
def pause(typingctx):
    """Tell the processor that this is a spin loop."""

    def generate(context, builder, signature, args):
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            function = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, function, "llvm.x86.sse2.pause"), [])
        elif machine in ("aarch64", "arm64"):
            function = ir.FunctionType(ir.VoidType(), [I32])
            builder.call(
                cgutils.get_or_insert_function(builder.module, function, "llvm.aarch64.hint"), [I32(1)]
            )
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def yield_processor(typingctx):
    """Let another thread of the machine run."""

    def generate(context, builder, signature, args):
        function = ir.FunctionType(I32, [])
        builder.call(cgutils.get_or_insert_function(builder.module, function, YIELD), [])
        return context.get_dummy_value()

    return types.void(), generate


@intrinsic
def call_kernel(typingctx, address, operands, step, first, last, thread):
    """Call the kernel compiled at `address` (see pyinfer.jit.kernel)."""

    def generate(context, builder, signature, args):
        function = ir.FunctionType(ir.VoidType(), [I64] * 5)
        builder.call(builder.inttoptr(args[0], function.as_pointer()), args[1:])
        return context.get_dummy_value()

    return types.void(*([types.int64] * 6)), generate


@intrinsic
def clock_ticks(typingctx):
    """The system's monotonic clock, TICKS_PER_SECOND."""

    def generate(context, builder, signature, args):
        time = cgutils.alloca_once(builder, I64, size=2)
        if sys.platform == "win32":
            function = ir.FunctionType(I32, [time.type])
            builder.call(cgutils.get_or_insert_function(builder.module, function, CLOCK), [time])
            return builder.load(time)
        function = ir.FunctionType(I32, [I32, time.type])
        callee = cgutils.get_or_insert_function(builder.module, function, CLOCK)
        builder.call(callee, [I32(CLOCK_MONOTONIC), time])
        seconds, nanoseconds = builder.load(time), builder.load(builder.gep(time, [I64(1)]))
        return builder.add(builder.mul(seconds, I64(1_000_000_000)), nanoseconds)

    return types.int64(), generate
