"""LLVM vectors as opaque Numba values, and the few emitters that all words share.

A *vector* is 16 lanes of float32 or int32, or 64 bytes; a *tile* is T vectors of 16 lanes, one per token of a
GEMM tile. Both live in registers as locals of a kernel. Addresses are int64.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import models, register_model

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
