# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Scalar functions that Triton's language lacks."""

import triton
import triton.language as tl

from trainkit.kernels._attention._elementwise import elementwise

floor_divide, floor_mod, log1p, sigmoid = elementwise(triton.jit)


@triton.jit
def tanh(x):
    """Exact to fp32's rounding near 1, and to 1e-7 near 0."""
    return 2.0 / (1.0 + tl.exp(-2.0 * x)) - 1.0
