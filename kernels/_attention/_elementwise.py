# mypy: ignore-errors
# (Triton's and Gluon's language, which Python's types do not describe.)
"""Scalar functions that both dialects lack, once for both."""

import triton.language as triton_language


def elementwise(jit, tl=triton_language):
    """The functions `floor_divide`, `floor_mod`, `log1p` and `sigmoid` in a dialect.

    Args:
        jit: the dialect's decorator.
        tl: its language; Triton's interpreter wants its own to be found in this module.
    """

    @jit
    def floor_divide(a, b):
        """Python's // of integers: Triton's rounds toward zero."""
        quotient = a // b
        rest = a - quotient * b
        return tl.where((rest != 0) & ((rest < 0) != (b < 0)), quotient - 1, quotient)

    @jit
    def floor_mod(a, b):
        """Python's % of integers: the result has the divisor's sign."""
        rest = a - a // b * b
        return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)

    @jit
    def log1p(x):
        """log(1 + x), exact for small x too (Kahan): the rounding of 1 + x cancels."""
        u = 1.0 + x
        exact = u == 1.0
        return tl.where(exact, x, tl.where(u == float("inf"), u, tl.log(u) * (x / tl.where(exact, 1.0, u - 1.0))))

    @jit
    def sigmoid(x):
        """1 / (1 + exp(-x))."""
        return 1.0 / (1.0 + tl.exp(-x))

    return floor_divide, floor_mod, log1p, sigmoid
