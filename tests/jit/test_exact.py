"""Words for quantizers against NumPy, inlined into kernels with relaxed arithmetic."""

from __future__ import annotations

import numba
import numpy as np

from pyinfer.jit.exact import (
    at_most_i32x16,
    bfloat_to_float,
    choose_less,
    div_f32x16,
    exact,
    first_largest,
    float_to_bfloat,
    greater_u32,
    greatest_of_32,
    least_of_32,
    magnitude_bits,
    magnitude_of,
    max_f32x16,
    min_f32x16,
    nearest_f32x16,
    nibble_pairs,
    round_away_i32x16,
    sqrt_f32x16,
    sub_f32x16,
    truncate_i32x16,
)
from pyinfer.jit.kernel import FASTMATH
from pyinfer.jit.simd import add_f32x16, load_f32x16, mul_f32x16, store_f32x16, store_i8x16

SPECIAL = np.array([0.0, -0.0, 0.5, -0.5, 1.5, -2.5, 0.49999997, -0.49999997, 126.5, -126.5], np.float32)


def compiled(function):
    return numba.njit(error_model="numpy", fastmath=FASTMATH)(function)


def sample(rows=64, columns=32):
    random = np.random.default_rng(8)
    values = random.standard_normal((rows, columns)).astype(np.float32)
    values[0, : len(SPECIAL)] = SPECIAL
    return values


@exact
def _product_and_sum(a, b, c):
    return add_f32x16(mul_f32x16(a, b), c)


def test_exact_rounds_after_each_operation():
    def run(x, out, rows):
        for k in range(rows):
            at = x + 192 * k
            store_f32x16(
                out + 64 * k, _product_and_sum(load_f32x16(at), load_f32x16(at + 64), load_f32x16(at + 128))
            )

    x, out = sample(512, 48), np.empty((512, 16), np.float32)
    compiled(run)(x.ctypes.data, out.ctypes.data, 512)
    a, b, c = x[:, :16], x[:, 16:32], x[:, 32:]
    np.testing.assert_array_equal(out, a * b + c)
    once = (a.astype(np.float64) * b + c).astype(np.float32)
    assert (out != once).any()  # or the sample could not tell


def test_lanes_equal_numpy():
    def run(x, out):
        a, b = load_f32x16(x), load_f32x16(x + 64)
        results = (min_f32x16(a, b), max_f32x16(a, b), sub_f32x16(a, b), div_f32x16(a, b), nearest_f32x16(a))
        for k in range(5):
            store_f32x16(out + 64 * k, results[k])
        store_f32x16(out + 320, choose_less(a, b, sqrt_f32x16(mul_f32x16(a, a)), b))

    out, run = np.empty((6, 16), np.float32), compiled(run)
    for row in sample():
        a, b = row[:16], row[16:]
        run(row.ctypes.data, out.ctypes.data)
        expected = (
            np.minimum(a, b),
            np.maximum(a, b),
            a - b,
            a / b,
            np.round(a),
            np.where(a < b, np.abs(a), b),
        )
        np.testing.assert_allclose(out, expected, rtol=3e-7, atol=0)


def test_whole_numbers():
    def run(x, out):
        a, b = load_f32x16(x), load_f32x16(x + 64)
        store_i8x16(out, truncate_i32x16(a))
        store_i8x16(out + 16, round_away_i32x16(a))
        store_i8x16(out + 32, at_most_i32x16(truncate_i32x16(b), np.int32(3)))
        store_i8x16(out + 48, nibble_pairs(truncate_i32x16(a), truncate_i32x16(b)))

    random = np.random.default_rng(1)
    x = (random.integers(-255, 255, 32) / 2).astype(np.float32)
    x[: len(SPECIAL)] = SPECIAL
    x[16:] = random.integers(0, 16, 16)
    out = np.empty((4, 16), np.int8)
    compiled(run)(x.ctypes.data, out.ctypes.data)
    a, b = x[:16].astype(np.float64), x[16:].astype(int)
    np.testing.assert_array_equal(out[0], np.trunc(a))
    np.testing.assert_array_equal(out[1], np.sign(a) * np.floor(np.abs(a) + 0.5))
    np.testing.assert_array_equal(out[2], np.minimum(b, 3))
    np.testing.assert_array_equal(out[3].view(np.uint8), (np.trunc(a).astype(int) & 15) | (b << 4) & 255)


def test_extremes_of_32():
    def run(x, out, rows):
        for k in range(rows):
            a, b = load_f32x16(x + 128 * k), load_f32x16(x + 128 * k + 64)
            out[k, 0], out[k, 1] = least_of_32(a, b), greatest_of_32(a, b)
            out[k, 2] = first_largest(a, b)
            out[k, 3] = np.float32(magnitude_bits(a, b) >= np.uint32(0x7F800000))

    x = sample()
    x[1], x[2], x[3] = 0.0, -0.0, np.where(np.arange(32) % 2, 0.0, -0.0)
    x[4, 5], x[4, 20], x[5, 20], x[6, 9] = -7, 7, -7, 7
    x[7, 31], x[8, 0], x[9, 16] = np.nan, np.inf, -np.inf
    out = np.empty((64, 4), np.float32)
    compiled(run)(x.ctypes.data, out, 64)
    finite = np.isfinite(x).all(1)
    np.testing.assert_array_equal(out[:, 3], ~finite)
    first = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)[:, 0]
    expected = np.stack([x.min(1), x.max(1), first], 1)[finite]
    np.testing.assert_array_equal(out[finite, :3], expected)
    assert np.signbit(out[1:4, 0]).tolist() == [False, True, True]  # -0 is below 0
    assert np.signbit(out[1:4, 1]).tolist() == [False, True, False]
    assert np.signbit(out[1:4, 2]).tolist() == [False, True, True]


def test_bfloat_and_magnitudes():
    @compiled
    def there(value):
        return float_to_bfloat(value)

    @compiled
    def back(bits):
        return bfloat_to_float(bits)

    @compiled
    def greater(a, b):
        return greater_u32(magnitude_of(a), magnitude_of(b))

    for value in np.float32([0.0, -0.0, 1.0, 1.00390625, 1.01171875, -3.1415927, 1e-40, 3e38]):
        bits = value.view(np.uint32)
        expected = (int(bits) + 0x7FFF + (int(bits) >> 16 & 1)) >> 16
        assert there(value) == expected
        assert back(np.uint16(expected)) == np.uint32(expected << 16).view(np.float32)
        assert greater(value, np.float32(-1)) == max(int(bits) & 0x7FFFFFFF, 0x3F800000)
