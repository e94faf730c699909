# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""4-bit keys and values in Triton: `_kv4`'s formulas, for kernels that append to a cache or read one.

Every function takes a row's two halves, columns `0 .. D / 2` and `D / 2 .. D`, as two tiles `[R, D / 2]`. The launch wants
`enable_fp_fusion=False` where codes must equal `_kv4.kv4_encode`'s bit for bit.
"""

import triton
import triton.language as tl

LARGEST = tl.constexpr(65504.0)
SMALLEST_STEP = tl.constexpr(2.0**-14)
ROUNDER = tl.constexpr(1.5 * 2**23)
"""Added and taken away, it rounds an fp32 number below 2^22 to the nearest integer, ties to even."""


@triton.jit
def affine(first, second):
    """Step and low, fp16 `[R]`, of fp32 halves."""
    a = tl.minimum(tl.maximum(first, -LARGEST), LARGEST)
    b = tl.minimum(tl.maximum(second, -LARGEST), LARGEST)
    low = tl.min(tl.minimum(a, b), 1).to(tl.float16)
    span = tl.max(tl.maximum(a, b), 1) - low.to(tl.float32)
    return tl.maximum(span * (1.0 / 15), SMALLEST_STEP).to(tl.float16), low


@triton.jit
def _codes(x, step, low):
    x = tl.minimum(tl.maximum(x, -LARGEST), LARGEST) - low.to(tl.float32)[:, None]
    x = tl.minimum(tl.maximum(x * tl.div_rn(1.0, step.to(tl.float32))[:, None], 0.0), 15.0)
    return ((x + ROUNDER) - ROUNDER).to(tl.uint8)


@triton.jit
def encode(first, second, step, low):
    """Codes `[R, D / 2]` uint8 of fp32 halves."""
    return _codes(first, step, low) | (_codes(second, step, low) << 4)


@triton.jit
def decode(codes, step, low):
    """Both halves in fp32, of codes `[R, D / 2]` and step and low `[R]`."""
    s = step.to(tl.float32)[:, None]
    z = low.to(tl.float32)[:, None]
    return (codes & 15).to(tl.float32) * s + z, (codes >> 4).to(tl.float32) * s + z


@triton.jit
def encode_rows(X, CODES, AFFINE, rows, HALF: tl.constexpr, BLOCK: tl.constexpr, R: tl.constexpr):
    """Whole rows, contiguous: what appending a run of tokens does, and what the tests compare."""
    row = (tl.program_id(0).to(tl.int64) * R + tl.arange(0, R))[:, None]
    col = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (col < HALF)
    # Beyond the row: its first number again, which changes neither minimum nor maximum.
    at = X + row * (2 * HALF)
    fill = tl.load(at, mask=row < rows, other=0.0).to(tl.float32)
    first = tl.where(inside, tl.load(at + col, mask=inside, other=0.0).to(tl.float32), fill)
    second = tl.where(inside, tl.load(at + HALF + col, mask=inside, other=0.0).to(tl.float32), fill)
    step, low = affine(first, second)
    tl.store(CODES + row * HALF + col, encode(first, second, step, low), mask=inside)
    tl.store(AFFINE + row * 2, step[:, None], mask=row < rows)
    tl.store(AFFINE + row * 2 + 1, low[:, None], mask=row < rows)
