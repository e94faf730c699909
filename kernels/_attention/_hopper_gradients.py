# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""What the two backward kernels on Hopper share: row statistics, probabilities, the way out."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

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
    b, h, args = problem[0], problem[1], problem[8]
    if c.ALIBI == 1:
        at = h * args[2]
    else:
        at = b * args[2] + h * args[4]
    return gl.load(args[0] + at).to(gl.float32) * LOG2E


@gluon.jit
def weigh(S, lse, shift, q, k, qv, kv, problem, words, MASKED: gl.constexpr, c: gl.constexpr):
    """Of a tile of raw scores, `qv` and `kv` being its indices, kept inside: (probabilities, what they are in the gradient).

    The second is the first times the derivative of the soft cap, where that is all that was done to the scores. `shift` is
    added to the scores in base 2 where there is ALiBi.
    """
    b, h, _, _, off, _, scale, cap, score_args, _ = problem
    factor = scale * LOG2E
    if c.CAP:
        S = tanh(S * (scale / cap))
        factor = cap * LOG2E
    T = S
    if c.SCORE is not None:
        T = c.SCORE(S * scale, b, h, qv, kv, off, score_args)
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
    b, h, _, _, off, _, scale, _, score_args, _ = problem
    ds = weight * dp
    if c.GRAD is not None:
        ds = c.GRAD(S * scale, ds, b, h, qv, kv, off, weight > 0.0, score_args, score_args, False)
        # Where the weight is 0 the score may be anything: 0 times its derivative, and not NaN.
        ds = gl.where(weight > 0.0, ds, 0.0)
    return ds


@gluon.jit
def put(desc, OUT, x, buffer, row, row0, col, stride, count, W: gl.constexpr, D: gl.constexpr, LO: gl.constexpr):
    """Write 64 rows of a result, row0 + 64 W on, through `buffer` by TMA (not waited for), at a sequence's end row by row.

    What went through the buffer before has left it by then.
    """
    first = row0 + 64 * W
    if first + 64 <= count:
        tma.store_wait(0)
        gl.thread_barrier()
        buffer.store(x)
        fence_async_shared()
        tma.async_copy_shared_to_global(desc, [row + first, col], buffer)
    else:
        at = first + gl.arange(0, 64, gl.SliceLayout(1, LO))
        cols = gl.arange(0, D, gl.SliceLayout(0, LO))
        to = OUT + (row + at[:, None]).to(gl.int64) * stride + (col + cols[None, :])
        gl.store(to, x, mask=(at < count)[:, None] & (cols >= 0)[None, :])
