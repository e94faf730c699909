# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""RMSNorm, a row a program forward; backward keeps a partial weight gradient a program, summed in a fixed order."""

import triton
import triton.language as tl


@triton.jit
def forward(X, W, Y, R, eps, N: tl.constexpr, BLOCK: tl.constexpr):
    """Y = X * R * W with R = 1 / sqrt(mean(X^2) + eps), kept for backward."""
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < N
    x = tl.load(X + row * N + cols, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
    r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / N + eps)
    tl.store(R + row, r)
    tl.store(Y + row * N + cols, (x * r * w).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def backward(X, W, R, DY, DX, DW, rows, N: tl.constexpr, BLOCK: tl.constexpr):
    """DX = R * (W dY - X R^2 mean(W dY X)); DW `[programs, N]` fp32 partial sums of dY X R."""
    first = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    inside = cols < N
    w = tl.load(W + cols, mask=inside, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    for row in range(first, rows, tl.num_programs(0)):
        at = (tl.full([], 0, tl.int64) + row) * N + cols
        x = tl.load(X + at, mask=inside, other=0.0).to(tl.float32)
        g = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
        r = tl.load(R + row)
        normal = x * r
        wg = w * g
        dx = r * (wg - normal * (tl.sum(wg * normal, 0) / N))
        dw += g * normal
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=inside)
    tl.store(DW + first.to(tl.int64) * N + cols, dw, mask=inside)
