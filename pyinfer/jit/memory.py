"""Words that read and write raw memory: kernels see addresses (int64), never array objects.

Typed pointers index like arrays: `x = f32_at(address); x[3]`. Halves travel as their bits; `half_to_float`
and `float_to_half` convert with the rounding of IEEE 754 (nearest, ties to even).
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyinfer.jit.llvm import F32, I16, I32, extend_half, truncate_to_half


def _pointer_word(numba_type):
    @intrinsic
    def at(typingctx, address):
        def generate(context, builder, signature, args):
            return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

        return types.CPointer(numba_type)(types.int64), generate

    return at


f32_at = _pointer_word(types.float32)
i8_at = _pointer_word(types.int8)
i32_at = _pointer_word(types.int32)
i64_at = _pointer_word(types.int64)
u8_at = _pointer_word(types.uint8)
u16_at = _pointer_word(types.uint16)
u32_at = _pointer_word(types.uint32)


def _unaligned_load(numba_type, llvm_type):
    @intrinsic
    def load(typingctx, address):
        def generate(context, builder, signature, args):
            instruction = builder.load(builder.inttoptr(args[0], llvm_type.as_pointer()))
            instruction.align = 1
            return instruction

        return numba_type(types.int64), generate

    return load


load_u16 = _unaligned_load(types.uint16, I16)
load_u32 = _unaligned_load(types.uint32, I32)


@intrinsic
def half_to_float(typingctx, bits):
    """uint16 bits of an IEEE half -> float32."""

    def generate(context, builder, signature, args):
        return extend_half(builder, args[0])

    return types.float32(types.uint16), generate


@intrinsic
def float_to_half(typingctx, value):
    """float32 -> uint16 bits of the nearest IEEE half."""

    def generate(context, builder, signature, args):
        return truncate_to_half(builder, args[0])

    return types.uint16(types.float32), generate


@intrinsic
def bits_to_float(typingctx, bits):
    """uint32 or int32 bits -> float32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], F32)

    return types.float32(bits), generate


@intrinsic
def float_to_bits(typingctx, value):
    """float32 -> its bits, as int32."""

    def generate(context, builder, signature, args):
        return builder.bitcast(args[0], I32)

    return types.int32(types.float32), generate


@intrinsic
def round_half_even(typingctx, value):
    """Nearest integer as float32, ties to even; one instruction, vectorizes."""

    def generate(context, builder, signature, args):
        function = ir.FunctionType(F32, [F32])
        name = "llvm.roundeven.f32"
        callee = builder.module.globals.get(name) or ir.Function(builder.module, function, name)
        return builder.call(callee, args)

    return types.float32(types.float32), generate


@intrinsic
def prefetch(typingctx, address):
    """Ask for the cache line at `address`, for reading."""

    def generate(context, builder, signature, args):
        pointer = builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        function = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
        name = "llvm.prefetch.p0"
        callee = builder.module.globals.get(name) or ir.Function(builder.module, function, name)
        builder.call(callee, [pointer, I32(0), I32(3), I32(1)])
        return context.get_dummy_value()

    return types.void(types.int64), generate
