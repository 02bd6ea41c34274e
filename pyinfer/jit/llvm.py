"""LLVM vectors as opaque Numba values, and the few emitters that all words share.

A *vector* is 16 lanes of float32 or int32, or 64 bytes; a *tile* is T vectors of 16 lanes, one per token of a
GEMM tile. Both live in registers as locals of a kernel. Addresses are int64.
"""

from __future__ import annotations

import platform

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

from pyinfer.jit.levels import effective_features

I8, I16, I32, I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
F16, F32 = ir.HalfType(), ir.FloatType()
LANES = 16
ELEMENTS = {"i8": I8, "i32": I32, "f32": F32}


class VectorType(types.Type):
    """<n x element> as a value."""

    def __init__(self, element: str, n: int):
        self.llvm = ir.VectorType(ELEMENTS[element], n)
        super().__init__(f"simd<{n} x {element}>")


class TileType(types.Type):
    """[T x <16 x element>] as a value; LLVM splits it into T registers."""

    def __init__(self, element: str, tokens: int):
        self.element, self.tokens = element, tokens
        self.llvm = ir.ArrayType(ir.VectorType(ELEMENTS[element], LANES), tokens)
        super().__init__(f"tile<{tokens} x 16 x {element}>")


@register_model(VectorType)
@register_model(TileType)
class _OpaqueModel(models.PrimitiveModel):
    def __init__(self, manager, frontend):
        super().__init__(manager, frontend, frontend.llvm)


f32x16, i32x16, u8x64 = VectorType("f32", 16), VectorType("i32", 16), VectorType("i8", 64)


def call(builder, name, result, *args):
    """Call an LLVM intrinsic by name."""
    function = ir.FunctionType(result, [arg.type for arg in args])
    return builder.call(cgutils.get_or_insert_function(builder.module, function, name), args)


def constant(llvm_vector, value):
    return ir.Constant(llvm_vector, [value] * llvm_vector.count)


def shuffle(builder, first, second, lanes):
    return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(I32, len(lanes)), list(lanes)))


def splat(builder, scalar, n=LANES):
    undefined = ir.Constant(ir.VectorType(scalar.type, n), ir.Undefined)
    return shuffle(builder, builder.insert_element(undefined, scalar, I32(0)), undefined, [0] * n)


def at(builder, address, llvm_type, offset=0):
    if offset:
        address = builder.add(address, I64(offset))
    return builder.inttoptr(address, llvm_type.as_pointer())


def load(builder, address, llvm_type, offset=0):
    instruction = builder.load(at(builder, address, llvm_type, offset))
    instruction.align = 1
    return instruction


def store(builder, value, address, offset=0):
    builder.store(value, at(builder, address, value.type, offset)).align = 1


def multiply_add(builder, a, b, c):
    """a * b + c, one rounding where the processor can."""
    flags = ("contract",)
    return builder.fadd(builder.fmul(a, b, flags=flags), c, flags=flags)


def word(result, generate, *arguments):
    """What an intrinsic with fixed types returns: generate(builder, *llvm values) -> llvm value or None."""

    def implementation(context, builder, signature, args):
        value = generate(builder, *args)
        return context.get_dummy_value() if value is None else value

    return result(*arguments), implementation


def has_half_instructions() -> bool:
    """Whether LLVM converts halves by itself: x86 without F16C would call functions that are not there."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return not x86 or "f16c" in effective_features()


def _like(value, llvm_type):
    """`llvm_type` itself for a scalar, a vector of it for a vector."""
    return ir.VectorType(llvm_type, value.type.count) if isinstance(value.type, ir.VectorType) else llvm_type


def _constant_like(llvm_type, number):
    return (
        constant(llvm_type, number)
        if isinstance(llvm_type, ir.VectorType)
        else ir.Constant(llvm_type, number)
    )


def extend_half(builder, bits):
    """Bits of halves (i16, scalar or vector) -> float32, exactly."""
    wide, real = _like(bits, I32), _like(bits, F32)
    if has_half_instructions():
        return builder.fpext(builder.bitcast(bits, _like(bits, F16)), real)

    def number(value):
        return _constant_like(wide, value)

    whole = builder.zext(bits, wide)
    magnitude = builder.shl(builder.and_(whole, number(0x7FFF)), number(13))
    # The exponent's bias differs by 112; as a product that holds for subnormal halves too.
    value = builder.fmul(builder.bitcast(magnitude, real), _constant_like(real, 2.0**112))
    infinite = builder.icmp_unsigned(">=", magnitude, number(0x7C00 << 13))
    finished = builder.bitcast(value, wide)
    finished = builder.select(infinite, builder.or_(magnitude, number(0x7F800000)), finished)
    sign = builder.shl(builder.and_(whole, number(0x8000)), number(16))
    return builder.bitcast(builder.or_(finished, sign), real)


def truncate_to_half(builder, value):
    """float32 (scalar or vector) -> bits of the nearest halves (i16), ties to even."""
    wide, real, narrow = _like(value, I32), _like(value, F32), _like(value, I16)
    if has_half_instructions():
        return builder.bitcast(builder.fptrunc(value, _like(value, F16)), narrow)

    def number(given):
        return _constant_like(wide, given)

    bits = builder.bitcast(value, wide)
    sign = builder.lshr(builder.and_(bits, number(0x80000000)), number(16))
    magnitude = builder.and_(bits, number(0x7FFFFFFF))
    # Normal: change the bias, add half a unit (a little less when even) and cut. Overflow becomes infinity by
    # itself.
    odd = builder.and_(builder.lshr(magnitude, number(13)), number(1))
    normal = builder.add(builder.add(magnitude, number((-112 << 23) & 0xFFFFFFFF)), number(0xFFF))
    normal = builder.lshr(builder.add(normal, odd), number(13))
    # Subnormal: adding 0.5 makes the processor round at the right bit.
    moved = builder.fadd(builder.bitcast(magnitude, real), _constant_like(real, 0.5))
    subnormal = builder.sub(builder.bitcast(moved, wide), number(0x3F000000))
    small = builder.icmp_unsigned("<", magnitude, number(0x38800000))
    large = builder.icmp_unsigned(">=", magnitude, number(0x47800000))
    nan = builder.icmp_unsigned(">", magnitude, number(0x7F800000))
    result = builder.select(small, subnormal, normal)
    result = builder.select(large, number(0x7C00), result)
    result = builder.select(nan, number(0x7E00), result)
    return builder.trunc(builder.or_(result, sign), narrow)
