"""The SIMD vocabulary on single vectors: load, store, arithmetic, reductions."""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyinfer.jit.llvm import (
    F32,
    I8,
    I16,
    I32,
    call,
    constant,
    extend_half,
    f32x16,
    i32x16,
    load,
    multiply_add,
    shuffle,
    splat,
    store,
    u8x64,
    word,
)


@intrinsic
def load_u8x64(typingctx, address):
    return word(u8x64, lambda b, a: load(b, a, u8x64.llvm), types.int64)


@intrinsic
def low_nibbles(typingctx, codes):
    return word(u8x64, lambda b, v: b.and_(v, constant(v.type, 15)), u8x64)


@intrinsic
def high_nibbles(typingctx, codes):
    return word(u8x64, lambda b, v: b.lshr(v, constant(v.type, 4)), u8x64)


@intrinsic
def load_f32x16(typingctx, address):
    return word(f32x16, lambda b, a: load(b, a, f32x16.llvm), types.int64)


@intrinsic
def load_f16x16(typingctx, address):
    """16 halves as float32."""
    return word(f32x16, lambda b, a: extend_half(b, load(b, a, ir.VectorType(I16, 16))), types.int64)


@intrinsic
def load_bf16x16(typingctx, address):
    """16 bfloat16 as float32."""

    def generate(b, a):
        wide = b.zext(load(b, a, ir.VectorType(I16, 16)), i32x16.llvm)
        return b.bitcast(b.shl(wide, constant(i32x16.llvm, 16)), f32x16.llvm)

    return word(f32x16, generate, types.int64)


def _bytes_as_integers(builder, address):
    return builder.zext(load(builder, address, ir.VectorType(I8, 16)), i32x16.llvm)


@intrinsic
def load_u8_f32x16(typingctx, address):
    """16 unsigned bytes as float32."""
    return word(f32x16, lambda b, a: b.sitofp(_bytes_as_integers(b, a), f32x16.llvm), types.int64)


@intrinsic
def load_low_nibbles_f32x16(typingctx, address):
    """The low halves of 16 bytes as float32."""

    def generate(b, a):
        codes = b.and_(_bytes_as_integers(b, a), constant(i32x16.llvm, 15))
        return b.sitofp(codes, f32x16.llvm)

    return word(f32x16, generate, types.int64)


@intrinsic
def load_high_nibbles_f32x16(typingctx, address):
    """The high halves of 16 bytes as float32."""

    def generate(b, a):
        codes = b.lshr(_bytes_as_integers(b, a), constant(i32x16.llvm, 4))
        return b.sitofp(codes, f32x16.llvm)

    return word(f32x16, generate, types.int64)


@intrinsic
def store_f32x16(typingctx, address, value):
    return word(types.void, lambda b, a, v: store(b, v, a), types.int64, f32x16)


@intrinsic
def splat_f32x16(typingctx, value):
    return word(f32x16, lambda b, v: splat(b, v), types.float32)


@intrinsic
def add_f32x16(typingctx, a, b):
    return word(f32x16, lambda builder, x, y: builder.fadd(x, y), f32x16, f32x16)


@intrinsic
def mul_f32x16(typingctx, a, b):
    return word(f32x16, lambda builder, x, y: builder.fmul(x, y), f32x16, f32x16)


@intrinsic
def fma_f32x16(typingctx, a, b, c):
    return word(f32x16, multiply_add, f32x16, f32x16, f32x16)


@intrinsic
def sum_f32x16(typingctx, value):
    """Sum of the 16 lanes as a tree (a fixed order)."""

    def generate(b, v):
        undefined = ir.Constant(v.type, ir.Undefined)
        for half in (8, 4, 2, 1):
            v = b.fadd(v, shuffle(b, v, undefined, [(k + half) % 16 for k in range(16)]))
        return b.extract_element(v, I32(0))

    return word(types.float32, generate, f32x16)


@intrinsic
def largest_of_32(typingctx, a, b):
    """The largest magnitude among the lanes of two vectors."""

    def generate(builder, x, y):
        x, y = (call(builder, "llvm.fabs.v16f32", v.type, v) for v in (x, y))
        both = call(builder, "llvm.maxnum.v16f32", x.type, x, y)
        return call(builder, "llvm.vector.reduce.fmax.v16f32", F32, both)

    return word(types.float32, generate, f32x16, f32x16)


@intrinsic
def round_i32x16(typingctx, value):
    """Nearest integers, ties to even."""
    return word(
        i32x16, lambda b, v: b.fptosi(call(b, "llvm.roundeven.v16f32", v.type, v), i32x16.llvm), f32x16
    )


@intrinsic
def sum_i32x16(typingctx, value):
    return word(types.int32, lambda b, v: call(b, "llvm.vector.reduce.add.v16i32", I32, v), i32x16)


@intrinsic
def store_i8x16(typingctx, address, value):
    """Write the low bytes of 16 integers."""
    return word(
        types.void, lambda b, a, v: store(b, b.trunc(v, ir.VectorType(I8, 16)), a), types.int64, i32x16
    )
