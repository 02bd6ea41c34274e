"""Q4_K: 256 elements in 144 bytes: half d, half dmin, 12 bytes of eight 6-bit (scale, minimum), 128 bytes of
nibbles.

value = d s q - dmin m in groups of 32. Source: ggml-quants.c, dequantize_row_q4_K and get_scale_min_k4.
"""

from numpy import float32, float64, int32, uint32

from pyinfer.jit.exact import choose_less, div_f32x16, max_f32x16, min_f32x16, store_u16, sub_f32x16
from pyinfer.jit.kernel import inline, kernel
from pyinfer.jit.memory import f32_at, float_to_half, half_to_float, load_u16, load_u32, u8_at
from pyinfer.jit.simd import (
    add_f32x16,
    fma_f32x16,
    load_f32x16,
    mul_f32x16,
    round_i32x16,
    splat_f32x16,
    store_f32x16,
    store_i8x16,
)
from pyinfer.names import GGMLType
from pyinfer.quants.blocks import finish, status_of
from pyinfer.quants.lanes import (
    CODES,
    blocks_of,
    clamped,
    lane_floats,
    number,
    scratch_of,
    transpose,
    weigh,
    weight,
)
from pyinfer.quants.panels import U4M, pack_codes

TYPE, LAYOUT, BLOCK, BLOCK_BYTES = GGMLType.Q4_K, U4M, 256, 144
TRIALS, TURNS, REFITS, FIRST, STRIDE = 21, 2, 2, 14.0, 0.15
RISEN = 8192  # place in scratch
STEP, OFFSET = 0, 1  # vectors in scratch: d and dmin of each lane's block
SCALES, MINIMA, ERRORS = 2, 3, 4
OTHER, SUMS = 5, 10


@inline
def nibbles(codes, i):
    """Elements 4 i .. 4 i + 3: each 32 bytes hold two groups of 32, low and high."""
    return (load_u32(codes + 32 * (i // 16) + 4 * (i % 8)) >> (4 * (i // 8 % 2))) & 0x0F0F0F0F


@inline
def six_bits(packed, g, k):
    """Scale (k = 0) or minimum (k = 1) of group g, from 12 bytes."""
    bytes_ = u8_at(packed)
    if g < 4:
        return bytes_[g + 4 * k] & 63
    return ((bytes_[g + 4] >> (4 * k)) & 15) | ((bytes_[g - 4 + 4 * k] >> 6) << 4)


@inline
def quad(block, i):
    return nibbles(block + 16, i)


@inline
def scale(block, g):
    return half_to_float(load_u16(block)) * float32(six_bits(block + 4, g, 0))


@inline
def minimum(block, g):
    return -half_to_float(load_u16(block + 2)) * float32(six_bits(block + 4, g, 1))


@kernel
def pack(operands, step, first, last, thread):
    pack_codes(quad, scale, minimum, (256, 144, 4, 32), operands, first, last)


@inline
def codes_of(x, inverse, shift):
    """Nearest codes 0 .. 15 of x * inverse + shift."""
    return clamped(fma_f32x16(x, inverse, shift), splat_f32x16(float32(0)), splat_f32x16(float32(15)))


@inline
def _risen(scratch, i):
    """Number i of each group above the group's least, so that sums of squares lose no digits to an offset."""
    return load_f32x16(scratch + RISEN + 64 * i)


@inline
def _raise(scratch) -> tuple:
    """Least numbers (at most 0) and ranges of the groups, and the sums of w, w y and w y y for _risen y."""
    least = most = number(scratch, 0)
    weights = numbers = squares = splat_f32x16(float32(0))
    for i in range(32):
        least, most = min_f32x16(number(scratch, i), least), max_f32x16(number(scratch, i), most)
    least = min_f32x16(least, splat_f32x16(float32(0)))
    for i in range(32):
        y, w = sub_f32x16(number(scratch, i), least), weight(scratch, i)
        store_f32x16(scratch + RISEN + 64 * i, y)
        wy = mul_f32x16(w, y)
        weights, numbers = add_f32x16(weights, w), add_f32x16(numbers, wy)
        squares = fma_f32x16(wy, y, squares)
    return least, sub_f32x16(most, least), (weights, numbers, squares)


@inline
def _fit(scratch, inverse, shift, least, known):
    """Least squares scale s and offset f >= least of y = s q - f, for the codes q that inverse and shift lead
    to, and what they leave.
    """
    weights, numbers, squares = known
    q_ = qq = qy = splat_f32x16(float32(0))
    for i in range(32):
        y = _risen(scratch, i)
        q = codes_of(y, inverse, shift)
        wq = mul_f32x16(weight(scratch, i), q)
        q_, qq, qy = add_f32x16(q_, wq), fma_f32x16(wq, q, qq), fma_f32x16(wq, y, qy)
    both = mul_f32x16(weights, qq)
    below = sub_f32x16(both, mul_f32x16(q_, q_))
    free = div_f32x16(sub_f32x16(mul_f32x16(q_, qy), mul_f32x16(qq, numbers)), below)
    # codes that are all alike (but for rounding) say nothing about two unknowns
    alike = mul_f32x16(both, splat_f32x16(float32(1e-5)))
    offset = choose_less(alike, below, max_f32x16(free, least), least)
    scale_ = div_f32x16(fma_f32x16(offset, q_, qy), qq)
    # sum of w (y - s q + f)^2
    left = fma_f32x16(mul_f32x16(scale_, scale_), qq, squares)
    left = fma_f32x16(mul_f32x16(offset, offset), weights, left)
    cross = fma_f32x16(scale_, qy, mul_f32x16(mul_f32x16(scale_, offset), q_))
    cross = sub_f32x16(cross, mul_f32x16(offset, numbers))
    return scale_, offset, sub_f32x16(left, add_f32x16(cross, cross))


@inline
def _search(scratch) -> tuple:
    """Scales and minima of 16 groups of 32: of several stretches of the codes over the range the one whose
    least squares fit leaves the least, then codes and fit in turns.
    """
    least, width, known = _raise(scratch)
    zero = splat_f32x16(float32(0))
    scale_, offset, best = mul_f32x16(width, splat_f32x16(float32(1 / 15))), zero, splat_f32x16(float32(3e38))
    for k in range(TRIALS + TURNS):
        inverse = div_f32x16(splat_f32x16(float32(FIRST + STRIDE * k)), width)
        shift = zero
        if k >= TRIALS:
            inverse = div_f32x16(splat_f32x16(float32(1)), scale_)
            shift = mul_f32x16(offset, inverse)
        found = _fit(scratch, inverse, shift, least, known)
        scale_ = choose_less(found[2], best, found[0], scale_)
        offset = choose_less(found[2], best, found[1], offset)
        best = min_f32x16(found[2], best)
    return scale_, sub_f32x16(offset, least)


@inline
def _error(scratch, scale_, minimum_):
    """Weighted squares of what is left of 16 groups with the nearest codes."""
    inverse = div_f32x16(splat_f32x16(float32(1)), scale_)
    shift = mul_f32x16(minimum_, inverse)
    total = splat_f32x16(float32(0))
    for i in range(32):
        x = number(scratch, i)
        rest = sub_f32x16(add_f32x16(x, minimum_), mul_f32x16(codes_of(x, inverse, shift), scale_))
        total = fma_f32x16(mul_f32x16(weight(scratch, i), rest), rest, total)
    return total


@inline
def _six_bit(value, step):
    """The nearest of 0 .. 63 steps."""
    return clamped(div_f32x16(value, step), splat_f32x16(float32(0)), splat_f32x16(float32(63)))


@inline
def _whole(scratch, scale_, minimum_, at):
    """Whole numbers of steps near scale and minimum with the least error; steps and results are set `at`."""
    step, offset = (
        load_f32x16(lane_floats(scratch, at + STEP)),
        load_f32x16(lane_floats(scratch, at + OFFSET)),
    )
    best_s = middle_s = _six_bit(scale_, step)
    best_m = middle_m = _six_bit(minimum_, offset)
    least = splat_f32x16(float32(3e38))
    for k in range(9):
        s = add_f32x16(middle_s, splat_f32x16(float32(k // 3 - 1)))
        m = add_f32x16(middle_m, splat_f32x16(float32(k % 3 - 1)))
        s = clamped(s, splat_f32x16(float32(0)), splat_f32x16(float32(63)))
        m = clamped(m, splat_f32x16(float32(0)), splat_f32x16(float32(63)))
        found = _error(scratch, mul_f32x16(s, step), mul_f32x16(m, offset))
        best_s, best_m = choose_less(found, least, s, best_s), choose_less(found, least, m, best_m)
        least = min_f32x16(found, least)
    store_f32x16(lane_floats(scratch, at + SCALES), best_s)
    store_f32x16(lane_floats(scratch, at + MINIMA), best_m)
    store_f32x16(lane_floats(scratch, at + ERRORS), least)


@inline
def _inverse(scratch) -> tuple:
    """What turns numbers into codes: 1 / scale and minimum / scale."""
    scale_ = mul_f32x16(load_f32x16(lane_floats(scratch, SCALES)), load_f32x16(lane_floats(scratch, STEP)))
    minimum_ = mul_f32x16(
        load_f32x16(lane_floats(scratch, MINIMA)), load_f32x16(lane_floats(scratch, OFFSET))
    )
    inverse = div_f32x16(splat_f32x16(float32(1)), scale_)
    return inverse, mul_f32x16(minimum_, inverse)


@inline
def _sums(scratch):
    """Of a = scale code, b = minimum: sums of w a a, w a b, w b b, w a x, w b x (vectors SUMS ...)."""
    scales, minima = load_f32x16(lane_floats(scratch, SCALES)), load_f32x16(lane_floats(scratch, MINIMA))
    inverse, shift = _inverse(scratch)
    aa = ab = bb = ax = bx = splat_f32x16(float32(0))
    for i in range(32):
        x, w = number(scratch, i), weight(scratch, i)
        a = mul_f32x16(codes_of(x, inverse, shift), scales)
        wa, wb = mul_f32x16(w, a), mul_f32x16(w, minima)
        aa, ab, bb = fma_f32x16(wa, a, aa), fma_f32x16(wa, minima, ab), fma_f32x16(wb, minima, bb)
        ax, bx = fma_f32x16(wa, x, ax), fma_f32x16(wb, x, bx)
    store_f32x16(lane_floats(scratch, SUMS), aa)
    store_f32x16(lane_floats(scratch, SUMS + 1), ab)
    store_f32x16(lane_floats(scratch, SUMS + 2), bb)
    store_f32x16(lane_floats(scratch, SUMS + 3), ax)
    store_f32x16(lane_floats(scratch, SUMS + 4), bx)


@inline
def _sum_of_block(scratch, vector, first_lane):
    lanes, total = f32_at(lane_floats(scratch, vector)), float64(0)
    for lane in range(first_lane, first_lane + 8):
        total += lanes[lane]
    return total


@inline
def _refit(scratch, first_lane):
    """A least squares fit of d and dmin of one block, to set OTHER."""
    aa, ab = _sum_of_block(scratch, SUMS, first_lane), _sum_of_block(scratch, SUMS + 1, first_lane)
    bb = _sum_of_block(scratch, SUMS + 2, first_lane)
    ax, bx = _sum_of_block(scratch, SUMS + 3, first_lane), _sum_of_block(scratch, SUMS + 4, first_lane)
    below = aa * bb - ab * ab
    d, dmin = (ax * bb - ab * bx) / below, (ax * ab - aa * bx) / below
    if not below > 1e-6 * aa * bb:  # no minima, or all alike
        d, dmin = ax / aa, float64(f32_at(lane_floats(scratch, OFFSET))[first_lane])
    d, dmin = _rounded(float32(d)), _rounded(float32(max(dmin, 0.0)))
    for lane in range(first_lane, first_lane + 8):
        f32_at(lane_floats(scratch, OTHER + STEP))[lane] = d
        f32_at(lane_floats(scratch, OTHER + OFFSET))[lane] = dmin


@inline
def _keep_better(scratch, first_lane):
    """Take over one block of set OTHER when it leaves less."""
    if _sum_of_block(scratch, OTHER + ERRORS, first_lane) < _sum_of_block(scratch, ERRORS, first_lane):
        for vector in range(OTHER):
            lanes, others = f32_at(lane_floats(scratch, vector)), f32_at(lane_floats(scratch, OTHER + vector))
            for lane in range(first_lane, first_lane + 8):
                lanes[lane] = others[lane]


@inline
def _improve(scratch):
    _sums(scratch)
    _refit(scratch, 0)
    _refit(scratch, 8)
    step = load_f32x16(lane_floats(scratch, OTHER + STEP))
    offset = load_f32x16(lane_floats(scratch, OTHER + OFFSET))
    scales, minima = load_f32x16(lane_floats(scratch, SCALES)), load_f32x16(lane_floats(scratch, MINIMA))
    _whole(scratch, mul_f32x16(scales, step), mul_f32x16(minima, offset), OTHER)
    _keep_better(scratch, 0)
    _keep_better(scratch, 8)


@inline
def _rounded(value):
    return half_to_float(float_to_half(value))


@inline
def _first_steps(scratch, scale_, minimum_):
    """d and dmin that put each block's largest scale and minimum at 63."""
    store_f32x16(lane_floats(scratch, STEP), scale_)
    store_f32x16(lane_floats(scratch, OFFSET), minimum_)
    for vector in (STEP, OFFSET):
        lanes = f32_at(lane_floats(scratch, vector))
        for first in (0, 8):
            most = float32(0)
            for lane in range(first, first + 8):
                most = max(most, lanes[lane])
            most = _rounded(most / float32(63))
            for lane in range(first, first + 8):
                lanes[lane] = most


@inline
def _write(scratch, first_lane, block):
    """One block from the codes and vectors of 8 lanes."""
    codes, target = u8_at(scratch + CODES + first_lane), u8_at(block)
    scales, minima = f32_at(lane_floats(scratch, SCALES)), f32_at(lane_floats(scratch, MINIMA))
    store_u16(block, float_to_half(f32_at(lane_floats(scratch, STEP))[first_lane]))
    store_u16(block + 2, float_to_half(f32_at(lane_floats(scratch, OFFSET))[first_lane]))
    for j in range(4):
        s, m = int32(scales[first_lane + j]), int32(minima[first_lane + j])
        s4, m4 = int32(scales[first_lane + j + 4]), int32(minima[first_lane + j + 4])
        target[4 + j] = s | ((s4 >> 4) << 6)
        target[8 + j] = m | ((m4 >> 4) << 6)
        target[12 + j] = (s4 & 15) | ((m4 & 15) << 4)
        for i in range(32):
            target[16 + 32 * j + i] = codes[16 * i + 2 * j] | (codes[16 * i + 2 * j + 1] << 4)


@inline
def _final_codes(scratch):
    inverse, shift = _inverse(scratch)
    for i in range(32):
        store_i8x16(scratch + CODES + 16 * i, round_i32x16(codes_of(number(scratch, i), inverse, shift)))


@kernel
def quantize(operands, step, first, last, thread):
    scratch = scratch_of(operands, thread)
    before, count, target = blocks_of(operands, first, last)
    status = 0
    for k in range(before, before + count, 2):
        second = min(k + 1, before + count - 1)
        most = uint32(0)
        for lane in range(8):
            most = max(most, transpose(operands, 256 * k + 32 * lane, 32, lane, scratch))
            most = max(most, transpose(operands, 256 * second + 32 * lane, 32, lane + 8, scratch))
        weigh(scratch, 32)
        scale_, minimum_ = _search(scratch)
        _first_steps(scratch, scale_, minimum_)
        _whole(scratch, scale_, minimum_, 0)
        for _ in range(REFITS):
            _improve(scratch)
        _final_codes(scratch)
        for lane, block in ((0, k), (8, second)):
            _write(scratch, lane, target + BLOCK_BYTES * block)
            d = float_to_half(f32_at(lane_floats(scratch, STEP))[lane])
            dmin = float_to_half(f32_at(lane_floats(scratch, OFFSET))[lane])
            status |= status_of(most, d) | status_of(most, dmin)
    finish(operands, thread, status)
