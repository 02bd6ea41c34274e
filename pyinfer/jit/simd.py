"""The SIMD vocabulary: opaque LLVM vectors of 16 lanes that live in registers as locals of a kernel.

A *vector* is 16 float32 lanes or 64 bytes; a *tile* is T vectors of 16 lanes, one per token of a GEMM tile. Every word is
written once over LLVM vectors; only the integer dot product differs by processor (`dot`). Addresses are int64.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

from pyinfer.jit.levels import level

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


# ---- the one word that differs by processor -------------------------------------------------------------------------


def _pieces(builder, vector, n):
    undefined = ir.Constant(vector.type, ir.Undefined)
    return [shuffle(builder, vector, undefined, range(k, k + n)) for k in range(0, vector.type.count, n)]


def _joined(builder, parts):
    while len(parts) > 1:
        n = parts[0].type.count * 2
        parts = [shuffle(builder, a, b, range(n)) for a, b in zip(parts[::2], parts[1::2])]
    return parts[0]


def _dot_avx512vnni(builder, acc, codes, x, wide):
    return call(builder, "llvm.x86.avx512.vpdpbusd.512", acc.type, acc, codes, x)


def _dot_avxvnni(builder, acc, codes, x, wide):
    parts = zip(_pieces(builder, acc, 8), _pieces(builder, codes, 32), _pieces(builder, x, 32))
    return _joined(builder, [call(builder, "llvm.x86.avx512.vpdpbusd.256", a.type, a, c, v) for a, c, v in parts])


def _dot_avx2(builder, acc, codes, x, wide):
    """pmaddubsw saturates at 16 bits, so codes above 127 go as two nibbles: 16 * high + low."""
    ones = constant(ir.VectorType(I16, 16), 1)

    def narrow(c, v):
        pairs = call(builder, "llvm.x86.avx2.pmadd.ub.sw", ir.VectorType(I16, 16), c, v)
        return call(builder, "llvm.x86.avx2.pmadd.wd", ir.VectorType(I32, 8), pairs, ones)

    def dot(a, c, v):
        if not wide:
            return builder.add(a, narrow(c, v))
        low = narrow(builder.and_(c, constant(c.type, 15)), v)
        high = narrow(builder.lshr(c, constant(c.type, 4)), v)
        return builder.add(builder.add(a, low), builder.shl(high, constant(high.type, 4)))

    parts = zip(_pieces(builder, acc, 8), _pieces(builder, codes, 32), _pieces(builder, x, 32))
    return _joined(builder, [dot(a, c, v) for a, c, v in parts])


def _dot_neondot(builder, acc, codes, x, wide):
    """sdot takes signed codes: codes above 127 go as (code - 128) and 2 * 64 * x is added back."""

    def sdot(a, c, v):
        return call(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", a.type, a, c, v)

    def dot(a, c, v):
        if not wide:
            return sdot(a, c, v)
        half = constant(v.type, 64)
        return sdot(sdot(sdot(a, builder.xor(c, constant(c.type, 128)), v), half, v), half, v)

    parts = zip(_pieces(builder, acc, 4), _pieces(builder, codes, 16), _pieces(builder, x, 16))
    return _joined(builder, [dot(a, c, v) for a, c, v in parts])


def _dot_portable(builder, acc, codes, x, wide):
    """255 * 127 fits 16 bits; four products per lane are then added in 32 bits."""
    wide16, wide32 = ir.VectorType(I16, 64), ir.VectorType(I32, 64)
    products = builder.sext(builder.mul(builder.zext(codes, wide16), builder.sext(x, wide16)), wide32)
    undefined = ir.Constant(wide32, ir.Undefined)
    for k in range(4):
        acc = builder.add(acc, shuffle(builder, products, undefined, range(k, 64, 4)))
    return acc


DOTS = {
    "avx512vnni": _dot_avx512vnni,
    "avxvnni": _dot_avxvnni,
    "avx2": _dot_avx2,
    "neondot": _dot_neondot,
    "portable": _dot_portable,
}


def dot(builder, acc, codes, x, wide):
    """acc <16 x i32> += sums of 4 neighbours of codes <64 x u8> * x <64 x s8>; wide says that codes may exceed 127."""
    return DOTS[level.get()](builder, acc, codes, x, wide)


# ---- vectors --------------------------------------------------------------------------------------------------------


def _word(result, generate, *arguments):
    """An intrinsic with fixed types: generate(builder, *llvm values) -> llvm value."""

    def implementation(context, builder, signature, args):
        value = generate(builder, *args)
        return context.get_dummy_value() if value is None else value

    return result(*arguments), implementation


@intrinsic
def load_u8x64(typingctx, address):
    return _word(u8x64, lambda b, a: load(b, a, u8x64.llvm), types.int64)


@intrinsic
def low_nibbles(typingctx, codes):
    return _word(u8x64, lambda b, v: b.and_(v, constant(v.type, 15)), u8x64)


@intrinsic
def high_nibbles(typingctx, codes):
    return _word(u8x64, lambda b, v: b.lshr(v, constant(v.type, 4)), u8x64)


@intrinsic
def load_f32x16(typingctx, address):
    return _word(f32x16, lambda b, a: load(b, a, f32x16.llvm), types.int64)


@intrinsic
def load_f16x16(typingctx, address):
    """16 halves as float32."""
    return _word(f32x16, lambda b, a: b.fpext(load(b, a, ir.VectorType(F16, 16)), f32x16.llvm), types.int64)


@intrinsic
def load_bf16x16(typingctx, address):
    """16 bfloat16 as float32."""

    def generate(b, a):
        wide = b.zext(load(b, a, ir.VectorType(I16, 16)), i32x16.llvm)
        return b.bitcast(b.shl(wide, constant(i32x16.llvm, 16)), f32x16.llvm)

    return _word(f32x16, generate, types.int64)


@intrinsic
def store_f32x16(typingctx, address, value):
    return _word(types.void, lambda b, a, v: store(b, v, a), types.int64, f32x16)


@intrinsic
def store_f16x16(typingctx, address, value):
    """Rounds to nearest halves."""
    return _word(
        types.void, lambda b, a, v: store(b, b.fptrunc(v, ir.VectorType(F16, 16)), a), types.int64, f32x16
    )


@intrinsic
def splat_f32x16(typingctx, value):
    return _word(f32x16, lambda b, v: splat(b, v), types.float32)


@intrinsic
def add_f32x16(typingctx, a, b):
    return _word(f32x16, lambda builder, x, y: builder.fadd(x, y), f32x16, f32x16)


@intrinsic
def mul_f32x16(typingctx, a, b):
    return _word(f32x16, lambda builder, x, y: builder.fmul(x, y), f32x16, f32x16)


@intrinsic
def fma_f32x16(typingctx, a, b, c):
    return _word(f32x16, multiply_add, f32x16, f32x16, f32x16)


@intrinsic
def sum_f32x16(typingctx, value):
    """Sum of the 16 lanes as a tree (a fixed order)."""

    def generate(b, v):
        undefined = ir.Constant(v.type, ir.Undefined)
        for half in (8, 4, 2, 1):
            v = b.fadd(v, shuffle(b, v, undefined, [(k + half) % 16 for k in range(16)]))
        return b.extract_element(v, I32(0))

    return _word(types.float32, generate, f32x16)


@intrinsic
def largest_of_32(typingctx, a, b):
    """The largest magnitude among the lanes of two vectors."""

    def generate(builder, x, y):
        x, y = (call(builder, "llvm.fabs.v16f32", v.type, v) for v in (x, y))
        both = call(builder, "llvm.maxnum.v16f32", x.type, x, y)
        return call(builder, "llvm.vector.reduce.fmax.v16f32", F32, both)

    return _word(types.float32, generate, f32x16, f32x16)


@intrinsic
def round_i32x16(typingctx, value):
    """Nearest integers, ties to even."""
    return _word(
        i32x16, lambda b, v: b.fptosi(call(b, "llvm.roundeven.v16f32", v.type, v), i32x16.llvm), f32x16
    )


@intrinsic
def sum_i32x16(typingctx, value):
    return _word(types.int32, lambda b, v: call(b, "llvm.vector.reduce.add.v16i32", I32, v), i32x16)


@intrinsic
def store_i8x16(typingctx, address, value):
    """Write the low bytes of 16 integers."""
    return _word(types.void, lambda b, a, v: store(b, b.trunc(v, ir.VectorType(I8, 16)), a), types.int64, i32x16)


# ---- tiles: T tokens at once ----------------------------------------------------------------------------------------


def _each(builder, tile, generate):
    for t in range(tile.type.count):
        tile = builder.insert_value(tile, generate(t, builder.extract_value(tile, t)), t)
    return tile


@intrinsic(prefer_literal=True)
def tile_zero(typingctx, tokens):
    """Float tile of zeros; `tokens` is a compile-time constant."""
    result = TileType("f32", tokens.literal_value)

    def generate(context, builder, signature, args):
        return ir.Constant(result.llvm, None)

    return result(tokens), generate


@intrinsic(prefer_literal=True)
def tile_zero_i32(typingctx, tokens):
    """Integer tile of zeros; `tokens` is a compile-time constant."""
    result = TileType("i32", tokens.literal_value)

    def generate(context, builder, signature, args):
        return ir.Constant(result.llvm, None)

    return result(tokens), generate


@intrinsic(prefer_literal=True)
def tile_splat_i32(typingctx, tokens, address, shift):
    """Integer tile whose row t is the int32 at address + 4 t, shifted left by `shift`, in all lanes."""
    result = TileType("i32", tokens.literal_value)
    bits = shift.literal_value

    def generate(context, builder, signature, args):
        tile = ir.Constant(result.llvm, ir.Undefined)
        for t in range(result.tokens):
            value = load(builder, args[1], I32, 4 * t)
            tile = builder.insert_value(tile, splat(builder, builder.shl(value, I32(bits)) if bits else value), t)
        return tile

    return result(tokens, types.int64, shift), generate


@intrinsic(prefer_literal=True)
def tile_dot(typingctx, acc, codes, address, wide):
    """acc[t] += dot4(codes, the 4 int8 at address + 32 t in all lanes); wide: codes may exceed 127."""

    def generate(context, builder, signature, args):
        tile, codes_, address_, _ = args

        def step(t, value):
            x = builder.bitcast(splat(builder, load(builder, address_, I32, 32 * t)), u8x64.llvm)
            return dot(builder, value, codes_, x, bool(wide.literal_value))

        return _each(builder, tile, step)

    return acc(acc, u8x64, types.int64, wide), generate


@intrinsic
def tile_add_scaled(typingctx, total, acc, scale, address):
    """total[t] += float(acc[t]) * (scale * the float32 at address + 4 t)."""

    def generate(context, builder, signature, args):
        tile, integers, scale_, address_ = args

        def step(t, value):
            factor = builder.fmul(scale_, splat(builder, load(builder, address_, F32, 4 * t)))
            return multiply_add(builder, builder.sitofp(builder.extract_value(integers, t), f32x16.llvm), factor, value)

        return _each(builder, tile, step)

    return total(total, acc, f32x16, types.int64), generate


@intrinsic
def tile_add_product(typingctx, total, vector, address, stride):
    """total[t] += vector * the float32 at address + stride t, in all lanes."""

    def generate(context, builder, signature, args):
        tile, vector_, address_, stride_ = args

        def step(t, value):
            where = builder.add(address_, builder.mul(stride_, I64(t)))
            return multiply_add(builder, vector_, splat(builder, load(builder, where, F32)), value)

        return _each(builder, tile, step)

    return total(total, f32x16, types.int64, types.int64), generate


@intrinsic
def tile_store(typingctx, tile, address, stride):
    """Write row t of the tile to address + stride t."""

    def generate(context, builder, signature, args):
        for t in range(tile.tokens):
            where = builder.add(args[1], builder.mul(args[2], I64(t)))
            store(builder, builder.extract_value(args[0], t), where)
        return context.get_dummy_value()

    return types.void(tile, types.int64, types.int64), generate


@intrinsic
def tile_add_memory(typingctx, tile, address, stride):
    """tile[t] + the 16 float32 at address + stride t."""

    def generate(context, builder, signature, args):
        def step(t, value):
            where = builder.add(args[1], builder.mul(args[2], I64(t)))
            return builder.fadd(value, load(builder, where, f32x16.llvm))

        return _each(builder, args[0], step)

    return tile(tile, types.int64, types.int64), generate


@intrinsic
def tile_add_vector(typingctx, tile, vector):
    """tile[t] + vector for every t."""

    def generate(context, builder, signature, args):
        return _each(builder, args[0], lambda t, value: builder.fadd(value, args[1]))

    return tile(tile, f32x16), generate


@intrinsic
def tile_scale_rows(typingctx, tile, address):
    """tile[t] * the float32 at address + 4 t."""

    def generate(context, builder, signature, args):
        return _each(
            builder, args[0], lambda t, v: builder.fmul(v, splat(builder, load(builder, args[1], F32, 4 * t)))
        )

    return tile(tile, types.int64), generate


@intrinsic(prefer_literal=True)
def tile_load(typingctx, tokens, address, stride):
    """Float tile whose row t is at address + stride t."""
    result = TileType("f32", tokens.literal_value)

    def generate(context, builder, signature, args):
        tile = ir.Constant(result.llvm, ir.Undefined)
        for t in range(result.tokens):
            where = builder.add(args[1], builder.mul(args[2], I64(t)))
            tile = builder.insert_value(tile, load(builder, where, f32x16.llvm), t)
        return tile

    return result(tokens, types.int64, types.int64), generate
