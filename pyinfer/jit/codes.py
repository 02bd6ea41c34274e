"""Words on rows of codes (`pyinfer.quants.neuron_rows`): 16 words of 32 bits are 128 4-bit or 64 8-bit
weights, and position k within the words of 16 lanes is one vector.
"""

from __future__ import annotations

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from pyinfer.jit.levels import level
from pyinfer.jit.llvm import (
    I16,
    I32,
    I64,
    LANES,
    TileType,
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
    truncate_to_half,
    word,
)


def _code(builder, words, bits, k):
    """Position k of every word as float32, times 2 ^ (bits k): a mask instead of a shift. The last position
    is shifted down instead (its top bit would be a sign).
    """
    if k == 32 // bits - 1:
        codes = builder.lshr(words, constant(words.type, 32 - bits))
    else:
        codes = builder.and_(words, constant(words.type, ((1 << bits) - 1) << (bits * k)))
    return builder.sitofp(codes, f32x16.llvm)


def code_factor(bits: int, k: int) -> float:
    """What `tile_add_codes` leaves position k multiplied by."""
    return 1.0 if k == 32 // bits - 1 else 2.0 ** (bits * k)


@intrinsic
def tile_add_codes(typingctx, tile, address, scale, shift):
    """tile[k] += codes at position k * scale * `code_factor`, for all k; the last row of the tile += shift.

    The tile has 9 rows for codes of 4 bits, 5 for 8 bits.
    """
    bits = 32 // (tile.tokens - 1)

    def generate(context, builder, signature, args):
        total, address_, scale_, shift_ = args
        words = load(builder, address_, i32x16.llvm)
        for k in range(32 // bits):
            code = _code(builder, words, bits, k)
            value = multiply_add(builder, code, scale_, builder.extract_value(total, k))
            total = builder.insert_value(total, value, k)
        last = builder.fadd(builder.extract_value(total, 32 // bits), shift_)
        return builder.insert_value(total, last, 32 // bits)

    return tile(tile, types.int64, f32x16, f32x16), generate


@intrinsic(prefer_literal=True)
def tile_codes(typingctx, tokens, address, scale, shift):
    """The weights of 16 words: row k is (codes at position k) * scale + shift. `tokens` is 8 or 4."""
    result = TileType("f32", tokens.literal_value)
    bits = 32 // result.tokens

    def generate(context, builder, signature, args):
        _, address_, scale_, shift_ = args
        words = load(builder, address_, i32x16.llvm)
        tile = ir.Constant(result.llvm, ir.Undefined)
        for k in range(result.tokens):
            factor = constant_f32(1.0 / code_factor(bits, k))
            value = builder.fmul(_code(builder, words, bits, k), factor)
            tile = builder.insert_value(tile, multiply_add(builder, value, scale_, shift_), k)
        return tile

    return result(tokens, types.int64, f32x16, f32x16), generate


@intrinsic
def tile_from_codes(typingctx, tile, share):
    """What `tile_add_codes` added up, as numbers: row k / `code_factor` + share * the last row."""
    result = TileType("f32", tile.tokens - 1)
    bits = 32 // result.tokens

    def generate(context, builder, signature, args):
        last = builder.extract_value(args[0], result.tokens)
        shift = builder.fmul(last, splat(builder, args[1]))
        out = ir.Constant(result.llvm, ir.Undefined)
        for k in range(result.tokens):
            value = builder.fmul(builder.extract_value(args[0], k), constant_f32(1.0 / code_factor(bits, k)))
            out = builder.insert_value(out, builder.fadd(value, shift), k)
        return out

    return result(tile, types.float32), generate


def _interleaved(builder, vectors):
    """Element p of every vector side by side, for p = 0, 1 ..."""
    if len(vectors) == 1:
        return vectors
    zipped = []
    for even, odd in zip(*(_interleaved(builder, vectors[first::2]) for first in (0, 1))):
        for half in (0, LANES // 2):
            lanes = [lane for p in range(half, half + LANES // 2) for lane in (p, LANES + p)]
            zipped.append(shuffle(builder, even, odd, lanes))
    return zipped


@intrinsic
def tile_by_column(typingctx, tile):
    """Positions of 16 words -> their columns in order: row i is columns 16 i and on. A word of 4-bit codes
    has its first four columns in the low nibbles of its bytes.
    """

    def generate(context, builder, signature, args):
        order = (0, 2, 4, 6, 1, 3, 5, 7) if tile.tokens == 8 else (0, 1, 2, 3)
        vectors = [builder.extract_value(args[0], k) for k in order]
        out = args[0]
        for i, vector in enumerate(_interleaved(builder, vectors)):
            out = builder.insert_value(out, vector, i)
        return out

    return tile(tile), generate


def constant_f32(value: float):
    return ir.Constant(f32x16.llvm, [value] * LANES)


@intrinsic(prefer_literal=True)
def load_scales(typingctx, address, lanes):
    """16 / lanes halves as float32, each in `lanes` neighbouring lanes; `lanes` is a compile-time
    constant.
    """
    each = lanes.literal_value

    def generate(context, builder, signature, args):
        halves = load(builder, args[0], ir.VectorType(I16, LANES // each))
        undefined = ir.Constant(halves.type, ir.Undefined)
        return extend_half(builder, shuffle(builder, halves, undefined, [k // each for k in range(LANES)]))

    return f32x16(types.int64, lanes), generate


@intrinsic
def tile_largest(typingctx, largest, tile):
    """The larger of `largest` and |tile|, for every row and lane."""

    def generate(context, builder, signature, args):
        out = args[0]
        for k in range(tile.tokens):
            value = builder.extract_value(args[1], k)
            value = call(builder, "llvm.fabs.v16f32", value.type, value)
            value = call(builder, "llvm.maxnum.v16f32", value.type, builder.extract_value(out, k), value)
            out = builder.insert_value(out, value, k)
        return out

    return tile(tile, tile), generate


@intrinsic
def store_quad(typingctx, address, target, step, inverse):
    """Four vectors of float32, `step` bytes apart, times inverse, rounded, plus 128: their bytes side by
    side.
    """

    def generate(builder, address_, target_, step_, inverse_):
        total = constant(i32x16.llvm, 0)
        for k in range(4):
            where = builder.add(address_, builder.mul(step_, ir.Constant(step_.type, k)))
            value = builder.fmul(load(builder, where, f32x16.llvm), inverse_)
            value = call(builder, "llvm.roundeven.v16f32", value.type, value)
            code = builder.add(builder.fptosi(value, i32x16.llvm), constant(i32x16.llvm, 128))
            total = builder.or_(total, builder.shl(code, constant(i32x16.llvm, 8 * k)))
        store(builder, total, target_)

    return word(types.void, generate, types.int64, types.int64, types.int64, f32x16)


@intrinsic
def store_code_scale(typingctx, largest, target):
    """Write largest / 127 as 16 halves and give what to multiply with for codes of -127 to 127 (0 for 0)."""

    def generate(builder, largest_, target_):
        scale = builder.fmul(largest_, constant_f32(1.0 / 127.0))
        store(builder, truncate_to_half(builder, scale), target_)
        some = builder.fcmp_ordered(">", largest_, constant_f32(0.0))
        return builder.select(some, builder.fdiv(constant_f32(127.0), largest_), constant_f32(0.0))

    return word(f32x16, generate, f32x16, types.int64)


def _mask_bits(builder, mask):
    return builder.zext(builder.bitcast(mask, ir.IntType(LANES)), I32)


@intrinsic
def nonzero_bits(typingctx, address):
    """Bit k tells whether the float32 at address + 4 k is not 0, for 16 of them."""

    def generate(builder, address_):
        x = load(builder, address_, f32x16.llvm)
        return _mask_bits(builder, builder.fcmp_unordered("!=", x, constant_f32(0.0)))

    return word(types.int32, generate, types.int64)


@intrinsic
def above_bits(typingctx, address, least):
    """Bit k tells whether the float32 at address + 4 k is larger than `least`; also for NaN."""

    def generate(builder, address_, least_):
        x = load(builder, address_, f32x16.llvm)
        return _mask_bits(builder, builder.fcmp_unordered(">", x, splat(builder, least_)))

    return word(types.int32, generate, types.int64, types.float32)


@intrinsic
def reaching_bits(typingctx, address, thresholds):
    """Bit k tells whether the float32 at address + 4 k is at least that at thresholds + 4 k; also for NaN."""

    def generate(builder, address_, thresholds_):
        x, least = (load(builder, each, f32x16.llvm) for each in (address_, thresholds_))
        return _mask_bits(builder, builder.fcmp_unordered(">=", x, least))

    return word(types.int32, generate, types.int64, types.int64)


@intrinsic
def list_bits(typingctx, bits, first, target):
    """Write first + k as int32 for every bit k (of 16) that is set, side by side from `target` on, where all
    16 must have room; returns how many. Without a branch: which bits are set is hard to foretell.
    """

    def generate(builder, bits_, first_, target_):
        first_ = builder.trunc(first_, I32)
        if level.get() == "avx512vnni":
            numbers = ir.Constant(i32x16.llvm, list(range(LANES)))
            numbers = builder.add(numbers, splat(builder, first_))
            mask = builder.bitcast(builder.trunc(bits_, I16), ir.VectorType(ir.IntType(1), LANES))
            name = "llvm.x86.avx512.mask.compress.v16i32"
            found = call(builder, name, numbers.type, numbers, constant(numbers.type, 0), mask)
            store(builder, found, target_)
            return builder.zext(call(builder, "llvm.ctpop.i32", I32, bits_), I64)
        count = I64(0)
        for k in range(LANES):
            store(builder, builder.add(first_, I32(k)), builder.add(target_, builder.shl(count, I64(2))))
            bit = builder.and_(builder.lshr(bits_, I32(k)), I32(1))
            count = builder.add(count, builder.zext(bit, I64))
        return count

    return word(types.int64, generate, types.int32, types.int64, types.int64)
