# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""What the two backward kernels on Hopper share: row statistics, probabilities, gradients of scores."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon

from trainkit.kernels._attention._elementwise_gluon import tanh
from trainkit.kernels._attention._hopper_bits import sifted
from trainkit.kernels._attention._hopper_tiles import LOG2E, masked


@gluon.jit
def row_stats(LSE, DELTA, rows, Sq):
    """Row statistics: lse in base 2 (+inf without keys and beyond the end, so that weights are 0 there) and delta."""
    lse = gl.load(LSE + rows, mask=rows < Sq, other=float("inf")) * LOG2E
    delta = gl.load(DELTA + rows, mask=rows < Sq, other=0.0)
    return gl.where(lse == -float("inf"), float("inf"), lse), delta


@gluon.jit
def slope_of(problem, c: gl.constexpr):
    """ALiBi's slope of the head, in base 2.

    Under a causal mask the distance needs no absolute value: slope * (q - k) is one term of the query, which joins its lse,
    and one of the key. Both count from a token of the tile, so that they are small where weights are not.
    """
    args = problem.score_args
    if c.ALIBI == 1:
        at = problem.h * args[2]
    else:
        at = problem.b * args[2] + problem.h * args[4]
    return gl.load(args[0] + at).to(gl.float32) * LOG2E


@gluon.jit
def weigh(S, lse, shift, q, k, qv, kv, problem, words, MASKED: gl.constexpr, c: gl.constexpr):
    """Of a tile of raw scores, `qv` and `kv` being its indices, kept inside: (probabilities, what they are in the gradient).

    The second is the first times the derivative of the soft cap, where that is all that was done to the scores. `shift` is
    added to the scores in base 2 where there is ALiBi.
    """
    factor = problem.scale * LOG2E
    if c.CAP:
        S = tanh(S * (problem.scale / problem.cap))
        factor = problem.cap * LOG2E
    T = S
    if c.SCORE is not None:
        T = c.SCORE(S * problem.scale, problem.b, problem.h, qv, kv, problem.off, problem.score_args)
        factor = LOG2E
    if MASKED and c.BITS:
        T = sifted(T, words)
    elif MASKED:
        T = masked(T, q, k, qv, kv, problem, c)
    T = T * factor
    if c.ALIBI:
        T = T + shift
    p = gl.exp2(T - lse)
    weight = p
    if c.CAP:
        weight = p * (1.0 - S * S)
    return p, weight


@gluon.jit
def score_gradient(weight, dp, S, qv, kv, problem, c: gl.constexpr):
    """Gradient of the raw scores S from that of the weights, `dp` (less the row's delta), and `weigh`'s second result."""
    ds = weight * dp
    if c.GRAD is not None:
        args = problem.score_args
        ds = c.GRAD(S * problem.scale, ds, problem.b, problem.h, qv, kv, problem.off, weight > 0.0, args, args, False)
        # Where the weight is 0 the score may be anything: 0 times its derivative, and not NaN.
        ds = gl.where(weight > 0.0, ds, 0.0)
    return ds
