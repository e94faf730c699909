# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""SwiGLU's gate, element by element."""

import triton
import triton.language as tl


@triton.jit
def forward(A, B, Y, sa, sb, sy, n, blocks, BLOCK: tl.constexpr):
    """Y = A sigmoid(A) B, rows of n columns."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    a = tl.load(A + row * sa + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + row * sb + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(Y + row * sy + at, (a / (1.0 + tl.exp(-a)) * b).to(Y.dtype.element_ty), mask=inside)


@triton.jit
def backward(A, B, DY, DA, DB, sa, sb, sdy, sda, sdb, n, blocks, BLOCK: tl.constexpr):
    """Recompute the gate instead of keeping it."""
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    a = tl.load(A + row * sa + at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(B + row * sb + at, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(DY + row * sdy + at, mask=inside, other=0.0).to(tl.float32)
    gate = 1.0 / (1.0 + tl.exp(-a))
    tl.store(DB + row * sdb + at, (g * a * gate).to(DB.dtype.element_ty), mask=inside)
    tl.store(DA + row * sda + at, (g * b * gate * (1.0 + a * (1.0 - gate))).to(DA.dtype.element_ty), mask=inside)
