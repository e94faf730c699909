# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Rotary positions: pairs (x[i], x[i + D/2]) turned by an angle that depends on the token and i."""

import triton
import triton.language as tl


@triton.jit
def rotate(X, Y, COS, SIN, sxb, sxs, sxh, S, H, cos_batch, SIGN: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
           BH: tl.constexpr):  # fmt: skip
    """All heads of one token; Y is dense `[B, S, H, D]`; SIGN = -1 turns back, which is the gradient."""
    token = tl.program_id(0)
    b = (token // S).to(tl.int64)
    s = token % S
    i = tl.arange(0, HALF)
    inside = i < D // 2
    angle = (b * cos_batch + s) * (D // 2) + i
    cos = tl.load(COS + angle, mask=inside, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(SIN + angle, mask=inside, other=0.0).to(tl.float32)[None, :] * SIGN
    h = tl.arange(0, BH)[:, None].to(tl.int64)
    mask = (h < H) & inside[None, :]
    at = X + b * sxb + s.to(tl.int64) * sxs + h * sxh + i[None, :]
    low = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    high = tl.load(at + D // 2, mask=mask, other=0.0).to(tl.float32)
    to = Y + token.to(tl.int64) * H * D + h * D + i[None, :]
    tl.store(to, (low * cos - high * sin).to(Y.dtype.element_ty), mask=mask)
    tl.store(to + D // 2, (high * cos + low * sin).to(Y.dtype.element_ty), mask=mask)
