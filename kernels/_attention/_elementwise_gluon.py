# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""Scalar functions that Gluon's language lacks."""

import triton.experimental.gluon.language as tl
from triton.experimental import gluon

from trainkit.kernels._attention._elementwise import elementwise

floor_divide, floor_mod, log1p, sigmoid = elementwise(gluon.jit, tl)


@gluon.jit
def tanh(x):
    """One instruction, relative error 2**-11: under the rounding of 16-bit inputs, which is all that Gluon paths take."""
    return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)


@gluon.jit
def exp2_polynomial(x, factor):
    """2**y of y = x * factor in [-126, 127], without special functions; relative error 2**-9.16 (bf16 rounds to 2**-9).

    After FlashAttention-4 (Zadouri et al.), in five instructions. NaN stays NaN. 744 + y is a number whose bits hold y from
    bit 14 on: shifted by nine they are, but for a constant, those of 2**n (1 + f), n being y's whole part and f its
    fraction. To f is added what it lacks, 2**f - 1 - f: a parabola, of no more than two terms if counted from its top. Its
    value as an integer is a float's below 2**25, whose exponent makes up for the constant.
    """
    bits = tl.fma(x, factor, 744.0).to(tl.int32, bitcast=True)
    # 512 + f: without y's whole part.
    a = tl.fma((bits & -0x7FC001).to(tl.float32, bitcast=True), 1681.8293, -861950.44)
    lack = -16062677.8 - a * a
    return ((bits << 9) + lack.to(tl.int32, bitcast=True)).to(tl.float32, bitcast=True)
