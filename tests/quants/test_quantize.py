"""Quantizing against the gguf package bit for bit; Q4_K and Q6_K against the errors that llama.cpp leaves."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from pyinfer.errors import FormatError
from pyinfer.jit.team import Team
from pyinfer.names import BLOCK, GGMLType
from pyinfer.quants.blocks import as_floats, quantize_rows

PYTHON_TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "bf16", "f32")  # gguf can write them
SEARCHED = ("q4_k", "q6_k")
KINDS = ("float32", "float16", "bfloat16")
every_kind = pytest.mark.parametrize("kind", KINDS)
every_type = pytest.mark.parametrize("name", (*PYTHON_TYPES, *SEARCHED))

# Root mean square errors of ggml_quantize_chunk (llama-cpp-python 0.3.36) on `numbers(case)`: plain, and
# weighted with magnitude + root mean square of 32, which is what llama.cpp makes small.
LLAMA_CPP = {
    ("q4_k", "bell"): (0.0701289, 0.0929517),
    ("q4_k", "heavy"): (0.0153213, 0.00809253),
    ("q4_k", "shifted"): (0.0699716, 0.127994),
    ("q4_k", "positive"): (0.0411298, 0.0544844),
    ("q4_k", "flat"): (0.0157275, 0.0113857),
    ("q4_k", "sparse"): (0.016044, 0.013123),
    ("q6_k", "bell"): (0.0174772, 0.0227457),
    ("q6_k", "heavy"): (0.0039169, 0.00204371),
    ("q6_k", "shifted"): (0.0266198, 0.0476082),
    ("q6_k", "positive"): (0.0174441, 0.022689),
    ("q6_k", "flat"): (0.00382054, 0.00272308),
    ("q6_k", "sparse"): (0.0025862, 0.00267322),
}


@pytest.fixture(scope="module")
def team():
    made = Team(2)
    yield made
    made.close()


def quantized(type_name, values, team, **names):
    type_ = GGMLType[type_name.upper()]
    block, block_bytes = BLOCK[type_]
    out = np.full((values.shape[0], values.shape[1] // block * block_bytes), 0xAA, np.uint8)
    quantize_rows(type_, values, out, team, **names)
    return out


def dequantized(name, blocks):
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name.upper()])


def as_kind(values, kind):
    if kind == "bfloat16":
        return (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(kind)


def awkward_rows(columns):
    """Rows of every size of number, of ties, of equal magnitudes, of zeros of either sign."""
    random = np.random.default_rng(11)
    rows = random.standard_normal((70, columns)) * random.choice([1e-6, 1e-3, 1.0, 100.0], (70, 1))
    rows[10:20] = np.round(rows[10:20] * 4) / 4 + 0.0  # no -0 beside 0
    rows[20] = random.integers(-8, 9, columns)  # the largest magnitude with both signs, and ties
    rows[21] = random.integers(-3, 3, columns) * 0.5
    rows[22] = random.integers(-127, 128, columns) + 0.5
    rows[23], rows[24] = 0.0, -0.0
    rows[25], rows[26] = 5.0, -5.0
    rows[27], rows[28] = np.abs(rows[27]), -np.abs(rows[28])
    rows[29, ::2] = 0.0
    rows[30, 1:] = 0.0  # one number in its block
    return rows.astype(np.float32)


@every_kind
@pytest.mark.parametrize("name", PYTHON_TYPES)
@pytest.mark.parametrize("columns", [32, 160])
def test_bits_equal_gguf(name, kind, columns, team):
    values = as_kind(awkward_rows(columns), kind)
    expected = gguf.quants.quantize(as_floats(values), gguf.GGMLQuantizationType[name.upper()])
    found = quantized(name, values, team)
    np.testing.assert_array_equal(found, expected.view(np.uint8).reshape(found.shape))


@every_kind
@pytest.mark.parametrize("name", ["f16", "bf16", "f32"])
def test_floats_of_any_number_of_columns(name, kind, team):
    values = as_kind(awkward_rows(160)[:, :7], kind)
    expected = gguf.quants.quantize(as_floats(values), gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(
        quantized(name, values, team).reshape(-1), expected.view(np.uint8).reshape(-1)
    )


@pytest.mark.parametrize("name", ["q4_1", "q5_1"])
def test_a_minimum_of_zeros_of_both_signs_is_zero(name, team):
    """NumPy's minimum of -0 and 0 depends on the processor; ours is -0, and the values are the same."""
    values = np.abs(awkward_rows(64))
    values[:, ::3], values[:, 1::3] = 0.0, -0.0
    found = quantized(name, values, team)
    expected = gguf.quants.quantize(values, gguf.GGMLQuantizationType[name.upper()])
    assert (found.reshape(-1, BLOCK[GGMLType[name.upper()]][1])[:, 3] == 0x80).all()
    np.testing.assert_array_equal(dequantized(name, found), dequantized(name, expected))


@pytest.mark.parametrize("name", PYTHON_TYPES)
def test_numbers_too_small_for_a_scale_become_zero(name, team):
    """Below 2^-126 a scale has no inverse; gguf's bits are undefined there."""
    values = np.full((2, 64), 1e-39, np.float32)
    values[1] = np.linspace(-1e-38, 1e-38, 64)
    exact = name in ("bf16", "f32")
    np.testing.assert_allclose(
        dequantized(name, quantized(name, values, team)).reshape(2, 64),
        values,
        rtol=0,
        atol=0.01e-38 if exact else 1e-30,
    )


@every_kind
@every_type
@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_what_is_not_finite_is_named(name, kind, bad, team):
    values = np.ones((40, 512), np.float32)
    values[23, 301] = float(bad)
    values[30, 7] = np.nan
    with pytest.raises(
        FormatError, match=rf"model: w: element \[123, 301\] is {bad}, expected a finite number"
    ):
        quantized(name, as_kind(values, kind), team, name="model: w", first_row=100)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "f16", "q4_k", "q6_k"])
def test_numbers_beyond_the_type_are_refused(name, team):
    values = np.ones((3, 256), np.float32)
    values[1, 5] = -1e9
    with pytest.raises(FormatError, match=r"w: row 1 has an element of 1e\+09, which is too large for"):
        quantized(name, values, team, name="w")


@every_type
def test_the_largest_number_of_each_type_passes(name, team):
    """Just below the limit nothing is refused and nothing becomes infinite."""
    values = np.zeros((1, 256), np.float32)
    values[0, 3] = 65519.0
    assert np.isfinite(dequantized(name, quantized(name, values, team))).all()


@every_type
def test_threads_do_not_change_bits(name, team):
    alone = Team(1)
    values = awkward_rows(768)
    np.testing.assert_array_equal(quantized(name, values, team), quantized(name, values, alone))
    alone.close()


@every_type
def test_no_rows_are_no_work(name, team):
    assert quantized(name, np.empty((0, 256), np.float32), team).size == 0


def numbers(case):
    """float32 [24, 768] of one kind of distribution, by integer arithmetic, so equal everywhere."""
    i = np.arange(24 * 768 * 12, dtype=np.uint64)
    for step in (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)):
        i = (i + np.uint64(1)) * step
        i ^= i >> np.uint64(31)
    uniform = (i >> np.uint64(40)).astype(np.float64) / 2**24
    bell = (uniform.reshape(-1, 12).sum(1) - 6).reshape(24, 768)
    shapes = {
        "bell": bell,
        "heavy": bell * np.abs(bell) * 0.1,
        "shifted": bell + 1.5,
        "positive": np.abs(bell),
        "flat": uniform[: 24 * 768].reshape(24, 768) - 0.5,
        "sparse": np.where(uniform[: 24 * 768].reshape(24, 768) < 0.9, 0.0, bell),
    }
    return shapes[case].astype(np.float32)


def errors(values, found):
    """Root mean squares of the error, plain and as llama.cpp weighs it."""
    squares = (found.astype(np.float64) - values) ** 2
    usual = np.sqrt((values.reshape(-1, 32).astype(np.float64) ** 2).mean(1)).repeat(32).reshape(values.shape)
    return np.sqrt(squares.mean()), np.sqrt((squares * (np.abs(values) + usual)).mean())


@pytest.mark.parametrize("name, case", LLAMA_CPP)
def test_search_leaves_no_more_than_llama_cpp(name, case, team):
    values = numbers(case)
    found = errors(values, dequantized(name, quantized(name, values, team)))
    for ours, theirs in zip(found, LLAMA_CPP[name, case]):
        assert 0.5 * theirs < ours <= theirs


@pytest.mark.parametrize("name", SEARCHED)
def test_search_is_the_same_for_every_source(name, team):
    """Numbers that all three kinds hold give the same blocks."""
    values = as_floats(as_kind(numbers("bell") * 0.02, "bfloat16"))
    wanted = quantized(name, values, team)
    for kind in KINDS:
        np.testing.assert_array_equal(quantized(name, as_kind(values, kind), team), wanted)


@pytest.mark.parametrize("name, most", [("q4_k", 15), ("q6_k", 31)])
def test_what_blocks_can_say_exactly_stays(name, most, team):
    """Groups of whole multiples of a power of two, zeros, and constants."""
    random = np.random.default_rng(5)
    values = random.integers(0, most + 1, (8, 768)).astype(np.float32)
    values[:, ::16], values[:, 5::16] = 0, most
    values *= np.float32(2.0) ** random.integers(-3, 3, (8, 1)).astype(np.float32)
    values[6], values[7] = 0.0, -0.0
    found = dequantized(name, quantized(name, values, team))
    np.testing.assert_allclose(found, values, rtol=0, atol=2e-3 * most * 4)
    assert not found[6:].any()


@pytest.mark.parametrize("name", SEARCHED)
def test_constants_and_single_numbers_survive(name, team):
    values = np.zeros((4, 256), np.float32)
    values[0], values[1] = 0.7, -0.7
    values[2, 77], values[3, 200] = 3.0, -3.0
    found = dequantized(name, quantized(name, values, team))
    np.testing.assert_allclose(found, values, rtol=0, atol=0.01)


@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
@pytest.mark.parametrize("size", [1e9, 1e20, 1e30, 3e38])
def test_numbers_too_large_to_search_are_refused(kind, size, team):
    values = (np.random.default_rng(5).uniform(-1, 1, (8, 256)) * size).astype(np.float32)
    block, block_bytes = BLOCK[GGMLType[kind.upper()]]
    out = np.zeros(values.size // block * block_bytes, np.uint8)
    with pytest.raises(FormatError, match="too large"):
        quantize_rows(GGMLType[kind.upper()], values, out, team, name="w")
