# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""Scalar functions that Gluon's language lacks."""

import triton.experimental.gluon.language as tl
from triton.experimental import gluon


@gluon.jit
def tanh(x):
    """One instruction, relative error 2**-11: under the rounding of 16-bit inputs, which is all that Gluon paths take."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@gluon.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@gluon.jit
def floor_divide(a, b):
    """Python's // of integers: Triton's rounds toward zero."""
    quotient = a // b
    rest = a - quotient * b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1, quotient)


@gluon.jit
def floor_mod(a, b):
    """Python's % of integers: the result has the divisor's sign."""
    return a - floor_divide(a, b) * b
