"""Q6_K: 256 elements in 210 bytes: 128 of low nibbles, 64 of high pairs, 16 signed scales, half d.

value = d s (q - 32) in groups of 16; kept as 8-bit codes q + 96. Source: ggml-quants.c, dequantize_row_q6_K.
"""

from numpy import float32, uint32

from pyinfer.jit.exact import choose_less, div_f32x16, max_f32x16, min_f32x16, store_u16, sub_f32x16
from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import f32_at, float_to_half, half_to_float, i8_at, load_u16, load_u32, u8_at
from pyinfer.jit.simd import (
    add_f32x16,
    fma_f32x16,
    mul_f32x16,
    round_i32x16,
    splat_f32x16,
    store_f32x16,
    store_i8x16,
    sum_f32x16,
)
from pyinfer.names import GGMLType
from pyinfer.quants.blocks import finish, status_of
from pyinfer.quants.lanes import (
    CODES,
    blocks_of,
    clamped,
    lane_floats,
    magnitude,
    number,
    scratch_of,
    transpose,
    weigh,
    weight,
)
from pyinfer.quants.panels import U8G16, pack_codes

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q6_K, U8G16, 256, 210
TRIALS, REFITS, FIRST, STRIDE = 21, 2, -30.6, 0.15


@inline
def quad(block, i):
    half, run, at = i // 32, i % 32 // 8, 4 * (i % 8)
    low = (load_u32(block + 64 * half + 32 * (run % 2) + at) >> (4 * (run // 2))) & 0x0F0F0F0F
    high = (load_u32(block + 128 + 32 * half + at) >> (2 * run)) & 0x03030303
    return (low | (high << 4)) + 0x60606060


@inline
def scale(block, g):
    return half_to_float(load_u16(block + 208)) * float32(i8_at(block + 192)[g])


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, None, (256, 210, 8, 16), operands, first, last)


@inline
def _codes(x, inverse):
    return clamped(mul_f32x16(x, inverse), splat_f32x16(float32(-32)), splat_f32x16(float32(31)))


@inline
def _fit(scratch, inverse, unit):
    """For the codes that `inverse` leads to: sums of w x q and w q q, where q is the code times `unit`."""
    product = square = splat_f32x16(float32(0))
    for i in range(16):
        x = number(scratch, i)
        q = mul_f32x16(_codes(x, inverse), unit)
        wq = mul_f32x16(weight(scratch, i), q)
        product, square = fma_f32x16(wq, x, product), fma_f32x16(wq, q, square)
    return product, square


@inline
def _search(scratch):
    """Scales of 16 groups: of several that put the largest number near code -32 the one whose least squares
    fit leaves the least.
    """
    extreme = largest = splat_f32x16(float32(0))
    for i in range(16):
        size = magnitude(number(scratch, i))
        extreme = choose_less(largest, size, number(scratch, i), extreme)
        largest = max_f32x16(size, largest)
    best = scale_ = splat_f32x16(float32(0))
    for k in range(TRIALS):
        inverse = div_f32x16(splat_f32x16(float32(FIRST - STRIDE * k)), extreme)
        product, square = _fit(scratch, inverse, splat_f32x16(float32(1)))
        ratio = div_f32x16(product, square)
        explained = mul_f32x16(ratio, product)
        scale_ = choose_less(best, explained, ratio, scale_)
        best = max_f32x16(explained, best)
    return scale_


@inline
def _error(scratch, scale_):
    """Weighted squares of what the nearest codes leave."""
    inverse = div_f32x16(splat_f32x16(float32(1)), scale_)
    total = splat_f32x16(float32(0))
    for i in range(16):
        x = number(scratch, i)
        rest = sub_f32x16(x, mul_f32x16(_codes(x, inverse), scale_))
        total = fma_f32x16(mul_f32x16(weight(scratch, i), rest), rest, total)
    return total


@inline
def _whole(scratch, scale_, d):
    """Whole multiples of d near `scale_` with the least error, and that error."""
    step, least, most = splat_f32x16(d), splat_f32x16(float32(-128)), splat_f32x16(float32(127))
    middle = clamped(div_f32x16(scale_, step), least, most)
    best, error = middle, _error(scratch, mul_f32x16(middle, step))
    for k in range(2):
        other = clamped(add_f32x16(middle, splat_f32x16(float32(2 * k - 1))), least, most)
        found = _error(scratch, mul_f32x16(other, step))
        best = choose_less(found, error, other, best)
        error = min_f32x16(found, error)
    return best, error


@inline
def _rounded(value):
    return half_to_float(float_to_half(value))


@inline
def _first_d(scratch, scales):
    """The d that puts the largest scale at -128."""
    store_f32x16(lane_floats(scratch, 0), scales)
    lanes, extreme = f32_at(lane_floats(scratch, 0)), float32(0)
    for lane in range(16):
        if abs(lanes[lane]) > abs(extreme):
            extreme = lanes[lane]
    return _rounded(extreme / float32(-128))


@inline
def _improved(scratch, scales, error, d):
    """Scales and d after a least squares fit of d to all 16 groups, where they leave less."""
    inverse = div_f32x16(splat_f32x16(float32(1)), mul_f32x16(scales, splat_f32x16(d)))
    product, square = _fit(scratch, inverse, scales)
    other_d = _rounded(sum_f32x16(product) / sum_f32x16(square))
    if not abs(other_d) > float32(0):
        return scales, error, d
    others, found = _whole(scratch, mul_f32x16(scales, splat_f32x16(other_d)), other_d)
    if sum_f32x16(found) < sum_f32x16(error):
        return others, found, other_d
    return scales, error, d


@inline
def _write(scratch, scales, d, block):
    inverse = div_f32x16(splat_f32x16(float32(1)), mul_f32x16(scales, splat_f32x16(d)))
    for i in range(16):
        q = add_f32x16(_codes(number(scratch, i), inverse), splat_f32x16(float32(32)))
        store_i8x16(scratch + CODES + 16 * i, round_i32x16(q))
    store_i8x16(block + 192, round_i32x16(scales))
    store_u16(block + 208, float_to_half(d))
    codes, target = u8_at(scratch + CODES), u8_at(block)
    for half in range(2):
        for i in range(32):
            at = 16 * (i % 16) + 8 * half + i // 16
            q0, q1, q2, q3 = codes[at], codes[at + 2], codes[at + 4], codes[at + 6]
            target[64 * half + i] = (q0 & 15) | ((q2 & 15) << 4)
            target[64 * half + 32 + i] = (q1 & 15) | ((q3 & 15) << 4)
            target[128 + 32 * half + i] = (q0 >> 4) | ((q1 >> 4) << 2) | ((q2 >> 4) << 4) | ((q3 >> 4) << 6)


@kernel
def quantize(operands, step, first, last, thread):
    scratch = scratch_of(operands, thread)
    before, count, target = blocks_of(operands, first, last)
    status = 0
    for k in range(before, before + count):
        most = uint32(0)
        for lane in range(16):
            most = max(most, transpose(operands, 256 * k + 16 * lane, 16, lane, scratch))
        weigh(scratch, 16)
        scales = _search(scratch)
        d = _first_d(scratch, scales)
        if d == float32(0):
            scales = splat_f32x16(float32(0))
        else:
            scales, error = _whole(scratch, scales, d)
            for _ in range(REFITS):
                scales, error, d = _improved(scratch, scales, error, d)
        _write(scratch, scales, d, target + BLOCK_BYTES * k)
        status |= status_of(most, float_to_half(d))
    finish(operands, thread, status)
