"""The SIMD word that every processor has in a form of its own: dot products of four neighbouring bytes, added
to 32-bit lanes. (Of the others only `pyinfer.jit.codes.list_bits` asks for the level.)
"""

from __future__ import annotations

from llvmlite import ir

from pyinfer.jit.levels import level
from pyinfer.jit.llvm import I16, I32, call, constant, shuffle


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
    return _joined(
        builder, [call(builder, "llvm.x86.avx512.vpdpbusd.256", a.type, a, c, v) for a, c, v in parts]
    )


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
    """acc <16 x i32> += sums of 4 neighbours of codes <64 x u8> * x <64 x s8>; wide says that codes may
    exceed 127.
    """
    return DOTS[level.get()](builder, acc, codes, x, wide)
