# mypy: ignore-errors
# (Gluon's language, which Python's types do not describe.)
"""What the two backward kernels on Hopper share: row statistics, probabilities, the way out."""

import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from trainkit.kernels._attention._hopper_tiles import LOG2E, masked


@gluon.jit
def row_stats(LSE, DELTA, rows, Sq):
    """Row statistics: lse in base 2 (+inf without keys and beyond the end, so that weights are 0 there) and delta."""
    lse = gl.load(LSE + rows, mask=rows < Sq, other=float("inf")) * LOG2E
    delta = gl.load(DELTA + rows, mask=rows < Sq, other=0.0)
    return gl.where(lse == -float("inf"), float("inf"), lse), delta


@gluon.jit
def weigh(
    S, lse, q, k, qv, kv, b, h, Sk, off, w, scale, score_args, mask_args, CAUSAL: gl.constexpr, WINDOW: gl.constexpr,
    MASKED: gl.constexpr, SCORE: gl.constexpr, MASK: gl.constexpr,
):  # fmt: skip
    """Probabilities of a tile of raw scores; `qv` and `kv` are its indices as vectors, kept inside."""
    factor = scale * LOG2E
    if SCORE is not None:
        S = SCORE(S * scale, b, h, qv, kv, off, score_args)
        factor = LOG2E
    if MASKED:
        S = masked(S, q, k, qv, kv, b, h, Sk, off, w, mask_args, CAUSAL, WINDOW, MASK)
    return gl.exp2(S * factor - lse)


@gluon.jit
def put(desc, OUT, x, buffer, row, row0, col, stride, count, W: gl.constexpr, D: gl.constexpr, LO: gl.constexpr):
    """Write 64 rows of a result, row0 + 64 W on, through `buffer` by TMA, or row by row at the end of a sequence."""
    first = row0 + 64 * W
    if first + 64 <= count:
        buffer.store(x)
        fence_async_shared()
        tma.async_copy_shared_to_global(desc, [row + first, col], buffer)
        tma.store_wait(0)
    else:
        at = first + gl.arange(0, 64, gl.SliceLayout(1, LO))
        cols = gl.arange(0, D, gl.SliceLayout(0, LO))
        to = OUT + (row + at[:, None]).to(gl.int64) * stride + (col + cols[None, :])
        gl.store(to, x, mask=(at < count)[:, None] & (cols >= 0)[None, :])
