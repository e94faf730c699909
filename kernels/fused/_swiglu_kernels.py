# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""SwiGLU's gate, element by element."""

import triton
import triton.language as tl


@triton.jit
def forward(A, B, Y, n, BLOCK: tl.constexpr):
    """Y = A sigmoid(A) B."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    a = tl.load(A + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + at, (a / (1.0 + tl.exp(-a)) * b).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def backward(A, B, DY, DA, DB, n, BLOCK: tl.constexpr):
    """Recompute the gate instead of keeping it."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    a = tl.load(A + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(DY + at, mask=inside, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-a))
    tl.store(DB + at, (g * a * gate).to(DB.dtype.element_ty), mask=inside)
    tl.store(DA + at, (g * b * gate * (1.0 + a * (1.0 - gate))).to(DA.dtype.element_ty), mask=inside)
