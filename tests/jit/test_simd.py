"""SIMD words against NumPy; the integer dot product at every level that this processor has, bit for bit."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from pyinfer.jit import levels, llvm
from pyinfer.jit.dots import DOTS
from pyinfer.jit.kernel import FASTMATH
from pyinfer.jit.memory import f32_at, float_to_half, u16_at
from pyinfer.jit.simd import (
    add_f32x16,
    fma_f32x16,
    high_nibbles,
    largest_of_32,
    load_bf16x16,
    load_f16x16,
    load_f32x16,
    load_u8x64,
    low_nibbles,
    mul_f32x16,
    round_i32x16,
    splat_f32x16,
    store_f32x16,
    store_i8x16,
    sum_f32x16,
    sum_i32x16,
)
from pyinfer.jit.tiles import (
    tile_add_memory,
    tile_add_product,
    tile_add_scaled,
    tile_add_vector,
    tile_dot,
    tile_load,
    tile_scale_rows,
    tile_splat_i32,
    tile_store,
    tile_zero,
    tile_zero_i32,
)

CASES = 300
# What only this level's machine code contains.
SIGNS = {"avx512vnni": "vpdpbusd\t%zmm", "avxvnni": "vpdpbusd\t%ymm", "avx2": "vpmaddubsw", "neondot": "sdot"}


def compiled(function):
    """As kernels are compiled, but never kept: the disk cache knows only the sources of the package."""
    return numba.njit(error_model="numpy", fastmath=FASTMATH)(function)


@pytest.fixture(params=levels.available())
def at_level(request):
    before = levels.level.get()
    levels.level.set(request.param)
    yield request.param
    levels.level.set(before)


def dots(codes, small_codes, x, start, wide_out, narrow_out):
    for case in range(CASES):
        tile = tile_splat_i32(tile_zero(3), start + 12 * case, 0)
        wide = tile_dot(tile, load_u8x64(codes + 64 * case), x + 96 * case, 1)
        narrow = tile_dot(tile, load_u8x64(small_codes + 64 * case), x + 96 * case, 0)
        tile_store(wide, wide_out + 192 * case, 64)
        tile_store(narrow, narrow_out + 192 * case, 64)


def _dot_cases(random, most):
    """codes uint8 [CASES, 64] up to `most` and x int8 [CASES, 3, 32], of which each row's first four
    count.
    """
    codes = random.integers(0, most + 1, (CASES, 64)).astype(np.uint8)
    x = random.integers(-127, 128, (CASES, 3, 32)).astype(np.int8)
    codes[0], x[0] = most, 127
    codes[1], x[1] = most, -127
    codes[2], x[2] = 0, -127
    codes[3], x[3] = most, np.where(np.arange(32) % 2, 127, -127)
    return codes, x


def _dots_by_numpy(codes, x, start):
    quads = codes.reshape(CASES, 1, 16, 4).astype(np.int64)
    return (quads * x[:, :, None, :4].astype(np.int64)).sum(3) + start[:, :, None]


def test_dot_is_exact_at_every_level(at_level):
    random = np.random.default_rng(1)
    codes, x = _dot_cases(random, 255)
    small_codes, _ = _dot_cases(random, 127)
    start = random.integers(-(2**20), 2**20, (CASES, 3)).astype(np.int32)
    found = np.zeros((2, CASES, 3, 16), np.int32)
    run = compiled(dots)
    run(*(array.ctypes.data for array in (codes, small_codes, x, start, found[0], found[1])))
    np.testing.assert_array_equal(found[0], _dots_by_numpy(codes, x, start))
    np.testing.assert_array_equal(found[1], _dots_by_numpy(small_codes, x, start))
    assembly = next(iter(run.inspect_asm().values()))
    assert at_level == "portable" or SIGNS[at_level] in assembly


def test_every_level_has_its_own_dot():
    assert set(DOTS) == set(levels.NAMES)


@compiled
def vector_words(a, b, out, integers, low_bytes, sums, nibbles):
    """Row k of `out` is the k-th word of a and b (16 float32 each)."""
    x, y = load_f32x16(a), load_f32x16(b)
    store_f32x16(out, add_f32x16(x, y))
    store_f32x16(out + 64, mul_f32x16(x, y))
    store_f32x16(out + 128, fma_f32x16(x, y, y))
    store_f32x16(out + 192, splat_f32x16(sum_f32x16(x)))
    store_f32x16(out + 256, splat_f32x16(largest_of_32(x, y)))
    rounded = round_i32x16(x)
    store_i8x16(low_bytes, rounded)
    tile = tile_add_scaled(tile_zero(1), tile_zero_i32(tile_zero(1)), x, b)
    tile_store(tile, out + 320, 64)
    tile_store(tile_splat_i32(tile_zero(2), integers, 4), integers + 64, 64)
    codes = load_u8x64(nibbles)
    tile_store(tile_dot(tile_zero_i32(tile_zero(1)), low_nibbles(codes), nibbles + 64, 0), sums + 64, 64)
    tile_store(tile_dot(tile_zero_i32(tile_zero(1)), high_nibbles(codes), nibbles + 64, 0), sums + 128, 64)
    return sum_i32x16(rounded)


def test_vector_words_equal_numpy():
    random = np.random.default_rng(2)
    a, b = random.uniform(-100, 100, (2, 16)).astype(np.float32)
    a[:6] = 0.5, 1.5, 2.5, -0.5, -1.5, 126.5  # ties go to even
    out, low_bytes = np.zeros((6, 16), np.float32), np.zeros(16, np.int8)
    integers, sums = np.zeros((3, 16), np.int32), np.zeros((3, 16), np.int32)
    integers[0, :2] = 5, -7
    nibbles = random.integers(0, 256, 128).astype(np.uint8)
    total = vector_words(*(array.ctypes.data for array in (a, b, out, integers, low_bytes, sums, nibbles)))
    np.testing.assert_array_equal(out[0], a + b)
    np.testing.assert_array_equal(out[1], a * b)
    np.testing.assert_allclose(out[2], a.astype(np.float64) * b + b, rtol=1e-6, atol=1e-4)
    np.testing.assert_allclose(out[3], a.sum(dtype=np.float64), rtol=1e-6)
    assert out[4, 0] == max(np.abs(a).max(), np.abs(b).max())
    assert not out[5].any()
    rounded = np.rint(a).astype(np.int32)
    np.testing.assert_array_equal(low_bytes, rounded.astype(np.int8))
    assert total == rounded.sum()
    np.testing.assert_array_equal(integers[1:], [[80] * 16, [-112] * 16])
    x = nibbles[64:68].view(np.int8).astype(np.int64)
    for row, codes in ((1, nibbles[:64] & 15), (2, nibbles[:64] >> 4)):
        np.testing.assert_array_equal(sums[row], (codes.reshape(16, 4).astype(np.int64) * x).sum(1))


@pytest.fixture(params=["instructions", "arithmetic"])
def half_words(request, monkeypatch):
    """The words compiled with the processor's conversions, and as for x86 without F16C."""
    if request.param == "arithmetic":
        monkeypatch.setattr(llvm, "has_half_instructions", lambda: False)
    return compiled(halves), compiled(to_halves)


def halves(source, wide, back, brain, n):
    for at in range(0, n, 16):
        x = load_f16x16(source + 2 * at)
        store_f32x16(wide + 4 * at, x)
        store_f32x16(brain + 4 * at, load_bf16x16(source + 2 * at))
    for at in range(n):
        u16_at(back)[at] = float_to_half(f32_at(wide)[at])


def to_halves(source, target, n):
    for at in range(n):
        u16_at(target)[at] = float_to_half(f32_at(source)[at])


def test_every_half_is_converted_as_numpy_does(half_words):
    bits = np.arange(1 << 16, dtype=np.uint16)
    wide, back, brain = (
        np.zeros(bits.size, np.float32),
        np.zeros(bits.size, np.uint16),
        np.zeros(bits.size, np.float32),
    )
    half_words[0](*(array.ctypes.data for array in (bits, wide, back, brain)), bits.size)
    expected = bits.view(np.float16).astype(np.float32)
    np.testing.assert_array_equal(wide, expected)
    number = ~np.isnan(expected)
    np.testing.assert_array_equal(back[number], bits[number])
    assert np.isnan(back[~number].view(np.float16)).all()
    np.testing.assert_array_equal(brain, (bits.astype(np.uint32) << 16).view(np.float32))


def test_floats_are_rounded_to_the_nearest_half(half_words):
    random = np.random.default_rng(3)
    values = (random.standard_normal(4096) * 10.0 ** random.uniform(-9, 6, 4096)).astype(np.float32)
    values[:6] = 0.0, -0.0, 65504.0, 65519.99, 65520.0, 2.0**-25
    found = np.zeros(values.size, np.uint16)
    half_words[1](values.ctypes.data, found.ctypes.data, values.size)
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(found, values.astype(np.float16).view(np.uint16))


@compiled
def tile_words(x, vector, factors, out):
    """Tiles of 4 rows; each word of float tiles once."""
    v = load_f32x16(vector)
    tile_store(tile_add_product(tile_load(4, x, 64), v, factors, 12), out, 64)
    tile_store(tile_add_memory(tile_load(4, x, 64), x + 64, 64), out + 256, 64)
    tile_store(tile_add_vector(tile_load(4, x, 64), v), out + 512, 64)
    tile_store(tile_scale_rows(tile_load(4, x, 64), factors), out + 768, 64)
    tile_store(
        tile_add_scaled(tile_load(4, x, 64), tile_splat_i32(tile_zero(4), factors + 64, 0), v, factors),
        out + 1024,
        64,
    )


def test_tile_words_equal_numpy():
    random = np.random.default_rng(4)
    x = random.standard_normal((5, 16)).astype(np.float32)
    vector, factors = random.standard_normal((2, 16)).astype(np.float32)
    given = np.concatenate([factors, np.array([3, -4, 5, 0], np.int32).view(np.float32)])
    out = np.zeros((5, 4, 16), np.float32)
    tile_words(x.ctypes.data, vector.ctypes.data, given.ctypes.data, out.ctypes.data)
    first, integers = x[:4], np.array([[3], [-4], [5], [0]])
    expected = [
        first + vector * factors[:12:3, None],
        first + x[1:],
        first + vector,
        first * factors[:4, None],
        first + integers * (vector * factors[:4, None]),
    ]
    np.testing.assert_allclose(out, np.stack(expected), rtol=1e-5, atol=1e-6)
