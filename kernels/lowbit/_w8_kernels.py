# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Products of 8-bit weights and activations: INT8 in int32, e4m3 in fp32, one scale a weight row and one a token."""

import triton
import triton.language as tl

from trainkit.kernels.lowbit._w4_kernels import _tile


@triton.jit
def linear(
    X, SX, W, SW, BIAS, Y, M, N, K: tl.constexpr, BIASED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, SWIZZLE: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Y `[M, N]` of X `[M, K]` and W `[N, K]` (K a multiple of BK), computed as `Y^T`, which suits few tokens."""
    pid_m, pid_n = _tile(tl.program_id(0), M, N, BM, BN, SWIZZLE)
    m = pid_m * BM + tl.arange(0, BM)
    n = pid_n * BN + tl.arange(0, BN)
    mc = tl.minimum(m, M - 1)
    nc = tl.minimum(n, N - 1)
    k = tl.arange(0, BK)
    x_rows = X + mc.to(tl.int64)[None, :] * K + k[:, None]
    w_rows = W + nc.to(tl.int64)[:, None] * K + k[None, :]
    KIND: tl.constexpr = tl.int32 if X.dtype.element_ty == tl.int8 else tl.float32
    sums = tl.zeros([BN, BM], KIND)
    for at in tl.range(0, K, BK, num_stages=STAGES):
        sums = tl.dot(tl.load(w_rows + at), tl.load(x_rows + at), sums, out_dtype=KIND)
    y = sums.to(tl.float32) * (tl.load(SW + nc).to(tl.float32)[:, None] * tl.load(SX + mc)[None, :])
    if BIASED:
        y += tl.load(BIAS + nc).to(tl.float32)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])
