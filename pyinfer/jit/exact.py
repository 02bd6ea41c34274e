"""SIMD words for quantizers, and `exact`, which marks helpers whose every rounding counts.

Kernels are compiled with relaxed arithmetic (`kernel.FASTMATH`), where a product and a sum may round once. A
function marked `exact` rounds after each operation as IEEE 754 says, also when it is inlined into a kernel.
"""

from __future__ import annotations

import numba
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyinfer.jit.llvm import F32, I16, I32, call, constant, f32x16, i32x16, store, word

# said aloud, because a callee without the option takes over its caller's
exact = numba.njit(forceinline=True, error_model="numpy", fastmath=False)

_MAGNITUDE, _SIGN = 0x7FFFFFFF, 0x80000000
_BELOW_HALF = 0x3EFFFFFF  # the largest float32 below 0.5


def _bits(builder, value):
    return builder.bitcast(value, i32x16.llvm)


def _lane_bits(builder, *conditions):
    """The truth of 16 lanes each, first lanes lowest, as one int32."""
    result = I32(0)
    for k, condition in enumerate(conditions):
        wide = builder.zext(builder.bitcast(condition, I16), I32)
        result = builder.or_(result, builder.shl(wide, I32(16 * k)))
    return result


def _magnitudes(builder, *vectors):
    return [builder.and_(_bits(builder, v), constant(i32x16.llvm, _MAGNITUDE)) for v in vectors]


def _largest_magnitude(builder, x, y):
    x, y = _magnitudes(builder, x, y)
    both = call(builder, "llvm.umax.v16i32", x.type, x, y)
    return call(builder, "llvm.vector.reduce.umax.v16i32", I32, both)


@intrinsic
def magnitude_bits(typingctx, a, b):
    """Bits of the largest magnitude among two vectors; at least 0x7F800000 when one is infinite or no number.

    Bits of magnitudes have the order of the magnitudes, and comparing them needs no care for NaN.
    """
    return word(types.uint32, _largest_magnitude, f32x16, f32x16)


@intrinsic
def first_largest(typingctx, a, b):
    """The number of the largest magnitude among two vectors, with its sign; the first among equals."""

    def generate(b, x, y):
        most = _largest_magnitude(b, x, y)
        every = b.shuffle_vector(
            b.insert_element(ir.Constant(i32x16.llvm, ir.Undefined), most, I32(0)),
            ir.Constant(i32x16.llvm, ir.Undefined),
            ir.Constant(i32x16.llvm, None),
        )
        equal = _lane_bits(b, *(b.icmp_signed("==", v, every) for v in _magnitudes(b, x, y)))
        zero = ir.Constant(i32x16.llvm, None)
        signs = _lane_bits(b, *(b.icmp_signed("<", _bits(b, v), zero) for v in (x, y)))
        function = ir.FunctionType(I32, [I32, ir.IntType(1)])
        name = "llvm.cttz.i32"
        callee = b.module.globals.get(name) or ir.Function(b.module, function, name)
        lane = b.and_(b.call(callee, [equal, ir.IntType(1)(0)]), I32(31))
        return b.bitcast(b.or_(most, b.shl(b.lshr(signs, lane), I32(31))), F32)

    return word(types.float32, generate, f32x16, f32x16)


def _extreme(name):
    """Least or greatest of two vectors in the order of the reals with -0 < +0: as integers with the magnitude
    of negative numbers turned around.
    """

    def ordered(b, bits):
        sign = b.ashr(bits, constant(bits.type, 31) if isinstance(bits.type, ir.VectorType) else I32(31))
        most = constant(bits.type, _MAGNITUDE) if isinstance(bits.type, ir.VectorType) else I32(_MAGNITUDE)
        return b.xor(bits, b.and_(sign, most))

    def generate(b, x, y):
        both = call(b, f"llvm.{name}.v16i32", i32x16.llvm, *(ordered(b, _bits(b, v)) for v in (x, y)))
        return b.bitcast(ordered(b, call(b, f"llvm.vector.reduce.{name}.v16i32", I32, both)), F32)

    return generate


@intrinsic
def least_of_32(typingctx, a, b):
    return word(types.float32, _extreme("smin"), f32x16, f32x16)


@intrinsic
def greatest_of_32(typingctx, a, b):
    return word(types.float32, _extreme("smax"), f32x16, f32x16)


@intrinsic
def sub_f32x16(typingctx, a, b):
    return word(f32x16, lambda builder, x, y: builder.fsub(x, y), f32x16, f32x16)


@intrinsic
def div_f32x16(typingctx, a, b):
    return word(f32x16, lambda builder, x, y: builder.fdiv(x, y), f32x16, f32x16)


@intrinsic
def min_f32x16(typingctx, a, b):
    """The lesser lanes; b where one is no number."""
    return word(f32x16, lambda bu, x, y: bu.select(bu.fcmp_ordered("<", x, y), x, y), f32x16, f32x16)


@intrinsic
def max_f32x16(typingctx, a, b):
    """The greater lanes; b where one is no number."""
    return word(f32x16, lambda bu, x, y: bu.select(bu.fcmp_ordered(">", x, y), x, y), f32x16, f32x16)


@intrinsic
def choose_less(typingctx, a, b, yes, no):
    """yes where a < b, no elsewhere."""

    def generate(builder, x, y, u, v):
        return builder.select(builder.fcmp_ordered("<", x, y), u, v)

    return word(f32x16, generate, f32x16, f32x16, f32x16, f32x16)


@intrinsic
def nearest_f32x16(typingctx, value):
    """Nearest whole numbers, ties to even."""
    return word(f32x16, lambda b, v: call(b, "llvm.roundeven.v16f32", v.type, v), f32x16)


@intrinsic
def sqrt_f32x16(typingctx, value):
    return word(f32x16, lambda b, v: call(b, "llvm.sqrt.v16f32", v.type, v), f32x16)


@intrinsic
def truncate_i32x16(typingctx, value):
    """Whole numbers, rounded towards zero."""
    return word(i32x16, lambda b, v: b.fptosi(v, i32x16.llvm), f32x16)


@intrinsic
def round_away_i32x16(typingctx, value):
    """Nearest whole numbers, ties away from zero, of lanes below 2^22 in magnitude."""

    def generate(b, v):
        signs = b.and_(_bits(b, v), constant(i32x16.llvm, _SIGN))
        halves = b.bitcast(b.or_(signs, constant(i32x16.llvm, _BELOW_HALF)), f32x16.llvm)
        return b.fptosi(b.fadd(v, halves), i32x16.llvm)

    return word(i32x16, generate, f32x16)


@intrinsic
def at_most_i32x16(typingctx, value, limit):
    def generate(b, v, limit_):
        lanes = ir.Constant(ir.VectorType(I32, 16), None)
        undefined = ir.Constant(v.type, ir.Undefined)
        every = b.shuffle_vector(b.insert_element(undefined, limit_, I32(0)), undefined, lanes)
        return call(b, "llvm.smin.v16i32", v.type, v, every)

    return word(i32x16, generate, i32x16, types.int32)


@intrinsic
def nibble_pairs(typingctx, low, high):
    """The low four bits of each lane of `low`, and above them those of `high`."""

    def generate(b, x, y):
        return b.or_(b.and_(x, constant(x.type, 15)), b.shl(y, constant(y.type, 4)))

    return word(i32x16, generate, i32x16, i32x16)


@intrinsic
def fifth_bits_of_32(typingctx, a, b):
    """Bit 4 of each lane of two vectors as one word, first lanes lowest."""

    def generate(builder, x, y):
        one = [
            builder.trunc(builder.lshr(v, constant(v.type, 4)), ir.VectorType(ir.IntType(1), 16))
            for v in (x, y)
        ]
        return _lane_bits(builder, *one)

    return word(types.uint32, generate, i32x16, i32x16)


def _unaligned_store(numba_type):
    @intrinsic
    def put(typingctx, address, value):
        return word(types.void, lambda b, a, v: store(b, v, a), types.int64, numba_type)

    return put


store_u16 = _unaligned_store(types.uint16)
store_u32 = _unaligned_store(types.uint32)


@intrinsic
def magnitude_of(typingctx, value):
    """The bits of a float32 without its sign."""
    return word(types.uint32, lambda b, v: b.and_(b.bitcast(v, I32), I32(_MAGNITUDE)), types.float32)


@intrinsic
def float_to_bfloat(typingctx, value):
    """float32 -> uint16 bits of the nearest bfloat16, ties to even; not for NaN."""

    def generate(b, v):
        bits = b.bitcast(v, I32)
        odd = b.and_(b.lshr(bits, I32(16)), I32(1))
        return b.trunc(b.lshr(b.add(b.add(bits, I32(0x7FFF)), odd), I32(16)), I16)

    return word(types.uint16, generate, types.float32)


@intrinsic
def bfloat_to_float(typingctx, bits):
    """uint16 bits of a bfloat16 -> float32."""
    return word(types.float32, lambda b, v: b.bitcast(b.shl(b.zext(v, I32), I32(16)), F32), types.uint16)


@intrinsic
def greater_u32(typingctx, a, b):
    """The greater of two; Numba's own `max` would widen them to 64 bits."""
    return word(
        types.uint32,
        lambda bu, x, y: bu.select(bu.icmp_unsigned(">", x, y), x, y),
        types.uint32,
        types.uint32,
    )
