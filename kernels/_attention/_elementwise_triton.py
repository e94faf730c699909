# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Scalar functions that Triton's language lacks."""

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """Exact to fp32's rounding near 1, and to 1e-7 near 0."""
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def floor_divide(a, b):
    """Python's // of integers: Triton's rounds toward zero."""
    quotient = a // b
    rest = a - quotient * b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1, quotient)


@triton.jit
def floor_mod(a, b):
    """Python's % of integers: the result has the divisor's sign."""
    return a - floor_divide(a, b) * b


@triton.jit
def log1p(x):
    """log(1 + x), exact for small x too (Kahan): the rounding of 1 + x cancels."""
    u = 1.0 + x
    exact = u == 1.0
    return tl.where(exact, x, tl.where(u == float("inf"), u, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0))))
