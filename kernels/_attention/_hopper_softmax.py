# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""The online softmax of the Hopper forward: one block's scores become weights, packed as the next product reads them."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from trainkit.kernels._attention._elementwise_gluon import exp2_polynomial, tanh
from trainkit.kernels._attention._hopper_bits import sifted
from trainkit.kernels._attention._hopper_tiles import LOG2E, masked


@gluon.jit
def halves(x, BN: gl.constexpr):
    """Even and odd columns: two neighbours share a register once they have 16 bits."""
    return x.reshape([64, BN // 2, 2]).split()


@gluon.jit
def pack(even, odd, BF16: gl.constexpr):
    """Two columns as 16-bit numbers in one word: what a loop carries as words stays in whole registers."""
    if BF16:
        return gl.inline_asm_elementwise("cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [even, odd], dtype=gl.int32,
                                         is_pure=True, pack=1)  # fmt: skip
    else:
        return gl.inline_asm_elementwise("cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [even, odd], dtype=gl.int32,
                                         is_pure=True, pack=1)  # fmt: skip


@gluon.jit
def unpack(words, BF16: gl.constexpr, BN: gl.constexpr, LO: gl.constexpr):
    """The packed weights as wgmma's first operand."""
    if BF16:
        even, odd = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [words],
                                              dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=1)  # fmt: skip
    else:
        even, odd = gl.inline_asm_elementwise("mov.b32 {$0, $1}, $2;", "=h,=h,r", [words],
                                              dtype=(gl.float16, gl.float16), is_pure=True, pack=1)  # fmt: skip
    return gl.convert_layout(gl.join(even, odd).reshape([64, BN]), gl.DotOperandLayout(0, LO, 2))


@gluon.jit
def rescaled(acc, alpha, LO: gl.constexpr, c: gl.constexpr):
    """The sums so far, under the new maximum."""
    if c.BOUNDED:
        return acc
    else:
        return acc * gl.convert_layout(alpha, gl.SliceLayout(1, LO))[:, None]


@gluon.jit
def clipped(S, rows, n0, problem, L: gl.constexpr, c: gl.constexpr):
    """Scores of keys from n0 on, -inf outside each query's range.

    Columns are told apart as (eights, lanes, neighbours), so that all of a column's number but the lane's part is known
    when the kernel is compiled: one comparison a side and element.
    """
    x = S.reshape([64, c.BN // 8, 4, 2])
    X: gl.constexpr = x.type.layout
    eights = gl.arange(0, c.BN // 8, gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, X))))
    lanes = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, X))))
    pair = gl.arange(0, 2, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, X))))
    k = 8 * eights[None, :, None, None] + pair[None, None, None, :]
    at = gl.convert_layout(rows, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, X)))) + (problem.off - n0)
    if c.CAUSAL:
        end = (at + 1)[:, None, None, None]
    elif c.WINDOW:
        end = gl.minimum(at + problem.w, problem.Sk - n0)[:, None, None, None]
    else:
        end = problem.Sk - n0
    seen = k < end - 2 * lanes[None, None, :, None]
    if c.WINDOW:
        seen = seen & (k > (at - problem.w)[:, None, None, None] - 2 * lanes[None, None, :, None])
    return gl.convert_layout(gl.where(seen, x, -float("inf")).reshape([64, c.BN]), L)


@gluon.jit
def exp2_by_both(x, factor, c: gl.constexpr):
    """2**(x * factor), all columns or six of eight on the FMA units, since the unit for special functions is busy with the
    scores' tanh: what was measured best at 128 and at 64. Which columns is known when the kernel is compiled.
    """
    polynomials: gl.constexpr = 8 if c.DV > 64 else 6
    eights = gl.arange(0, c.BN // 2, gl.SliceLayout(0, x.type.layout)) // 4
    return gl.where((eights * polynomials % 8 < polynomials)[None, :], exp2_polynomial(x, factor), gl.exp2(x * factor))


@gluon.jit
def fold(S, m, row_sum, n0, rows, words, problem, MASKED: gl.constexpr, L: gl.constexpr, c: gl.constexpr):
    """One online-softmax step on a block of raw scores: (even and odd weights, new maximum, new row sum, alpha)."""
    factor = problem.scale * LOG2E
    cols = n0 + gl.arange(0, c.BN, gl.SliceLayout(0, L))
    inside = gl.minimum(cols, problem.Sk - 1)
    if c.CAP:
        S = tanh(S * (problem.scale / problem.cap))
        factor = problem.cap * LOG2E
    if c.SCORE is not None:
        S = c.SCORE(S * problem.scale, problem.b, problem.h, rows, inside, problem.off, problem.score_args)
        factor = LOG2E
    if MASKED:
        if c.BITS:
            S = sifted(S, words)
        elif c.MASK is None:
            S = clipped(S, rows, n0, problem, L, c)
        else:
            S = masked(S, rows[:, None], cols[None, :], rows, inside, problem, c)
    even, odd = halves(S, c.BN)
    if c.BOUNDED:
        # Capped scores are small enough for exponentials as they are.
        if MASKED:
            even = gl.exp2(even * factor)
            odd = gl.exp2(odd * factor)
        else:
            even = exp2_by_both(even, factor, c)
            odd = exp2_by_both(odd, factor, c)
        row_sum = row_sum + gl.sum(even + odd, 1)
        alpha = row_sum
    else:
        # `factor` is positive (the host sees to it), so it may follow the maximum.
        m_new = gl.maximum(m, gl.max(gl.maximum(even, odd), 1) * factor)
        top = m_new
        if MASKED or c.SCORE is not None:
            top = gl.where(m_new == -float("inf"), 0.0, m_new)
        even = gl.exp2(even * factor - top[:, None])
        odd = gl.exp2(odd * factor - top[:, None])
        alpha = gl.exp2(m - top)
        row_sum = row_sum * alpha + gl.sum(even + odd, 1)
        m = m_new
    return even, odd, m, row_sum, alpha
