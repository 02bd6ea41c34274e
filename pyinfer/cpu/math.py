"""Scalar functions that vectorize: no call to a math library, whose functions run one lane at a time."""

from numpy import float32, int32

from pyinfer.jit.kernel import inline
from pyinfer.jit.memory import bits_to_float, round_half_even


@inline
def exp(x):
    """e^x of a float32, relative error below 1e-7; 0 far below, large but finite above 88.

    Cody-Waite reduction to [-ln 2 / 2, ln 2 / 2] and a polynomial of degree 6 (coefficients as in Cephes'
    expf).
    """
    x = min(max(x, float32(-87.3)), float32(88.3))
    n = round_half_even(x * float32(1.44269504))
    r = x - n * float32(0.693359375)
    r = r - n * float32(-2.12194440e-4)
    p = float32(1.9875691500e-4)
    p = p * r + float32(1.3981999507e-3)
    p = p * r + float32(8.3334519073e-3)
    p = p * r + float32(4.1665795894e-2)
    p = p * r + float32(1.6666665459e-1)
    p = p * r + float32(5.0000001201e-1)
    p = p * r * r + r + float32(1)
    return p * bits_to_float(int32((int32(n) + int32(127)) << int32(23)))


@inline
def silu(x):
    """x / (1 + e^-x)"""
    return x / (float32(1) + exp(-x))


@inline
def gelu(x):
    """GELU in its tanh form: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))), as x / (1 + e^-2u)."""
    u = float32(0.7978845608) * x * (float32(1) + float32(0.044715) * x * x)
    return x / (float32(1) + exp(float32(-2) * u))


@inline
def relu(x):
    return max(x, float32(0))


@inline
def gelu_erf(x):
    """GELU in its exact form 0.5 x (1 + erf(x / sqrt 2)); erf within 1.5e-7 (Abramowitz & Stegun 7.1.26)."""
    a = abs(x) * float32(0.70710678)
    t = float32(1) / (float32(1) + float32(0.3275911) * a)
    p = float32(1.061405429) * t - float32(1.453152027)
    p = (p * t + float32(1.421413741)) * t - float32(0.284496736)
    tail = (p * t + float32(0.254829592)) * t * exp(-a * a)  # 1 - erf(a)
    return x - float32(0.5) * x * tail if x > float32(0) else float32(0.5) * x * tail


@inline
def relu2(x):
    """max(x, 0)^2 (So et al. 2021)"""
    positive = max(x, float32(0))
    return positive * positive


@inline
def fatrelu(x, threshold):
    """x where x > threshold, else 0 (ProSparse's FATReLU)."""
    return x if x > threshold else float32(0)
