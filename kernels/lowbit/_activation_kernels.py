# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Activations to codes in one pass a token: what stands before (a norm, a gated product), the reordering, the rounding."""

import triton
import triton.language as tl

TINY = tl.constexpr(2.0**-100)
ROUNDER = tl.constexpr(1.5 * 2**23)
"""Added and taken away, it rounds an fp32 number below 2^22 to the nearest integer, ties to even."""
ABS = tl.constexpr(0x7FFFFFFF)


@triton.jit
def largest(x, axis: tl.constexpr):
    """The greatest magnitude; NaN where an x is one: as whole numbers, NaN's bits are the greatest."""
    return tl.max(x.to(tl.int32, bitcast=True) & ABS, axis).to(tl.float32, bitcast=True)


@triton.jit
def rounded(x, inverse, LEAST: tl.constexpr, MOST: tl.constexpr):
    return tl.minimum(tl.maximum((x * inverse + ROUNDER) - ROUNDER, LEAST), MOST)


@triton.jit
def _values(X, W, ORDER, row, at, inside, r, STRIDE, K: tl.constexpr, FRONT: tl.constexpr, ORDERED: tl.constexpr):
    """The layer's input at these places of its order, in fp32, rounded as the unfused operation would store it."""
    if ORDERED:
        channel = tl.load(ORDER + at, mask=inside, other=-1)
        inside = channel >= 0
    else:
        channel = at
        inside = inside & (at < K)
    start = X + row.to(tl.int64) * STRIDE
    x = tl.load(start + channel, mask=inside, other=0.0).to(tl.float32)
    if FRONT == "norm":
        w = tl.load(W + channel, mask=inside, other=0.0).to(tl.float32)
        x = (x * r * w).to(X.dtype.element_ty).to(tl.float32)
    elif FRONT == "gate":
        up = tl.load(W + row.to(tl.int64) * STRIDE + channel, mask=inside, other=0.0).to(tl.float32)
        x = (x / (1.0 + tl.exp(-x)) * up).to(X.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def quantise(
    X, W, ORDER, Y, CODES, SCALES, OUT, OUT_SCALES, M, STRIDE, eps, factor,
    K: tl.constexpr, MAIN: tl.constexpr, COUNT: tl.constexpr, GROUP: tl.constexpr, GROUPS: tl.constexpr, WHOLE: tl.constexpr,
    OB: tl.constexpr, FRONT: tl.constexpr, ORDERED: tl.constexpr, KIND: tl.constexpr, STORE: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """A token a program.

    X `[M, K]`; W the norm's weight `[K]`, or with FRONT "gate" what silu(X) is multiplied with, `[M, K]`. MAIN channels, K
    padded, in GROUPS (a power of two at least MAIN / GROUP) by GROUP; then COUNT outliers. KIND: "int4" in groups as e4m3,
    "int8" and "fp8" with one scale a token. STORE: also write the layer's input itself to Y (`[M, K]`, in X's order).
    """
    row = tl.program_id(0)
    if CHAINED:
        # What is launched next may start, and waits where it needs this one's results.
        tl.extra.cuda.gdc_launch_dependents()
    r = 1.0
    if FRONT == "norm":
        cols = tl.arange(0, WHOLE)
        x = tl.load(X + row.to(tl.int64) * STRIDE + cols, mask=cols < K, other=0.0).to(tl.float32)
        r = 1.0 / tl.sqrt(tl.sum(x * x, 0) / K + eps)
        if STORE:
            w = tl.load(W + cols, mask=cols < K, other=0.0).to(tl.float32)
            tl.store(Y + row.to(tl.int64) * K + cols, (x * r * w).to(Y.dtype.element_ty), mask=cols < K)
    at = tl.arange(0, GROUPS)[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    x = _values(X, W, ORDER, row, at, at < MAIN, r, STRIDE, K, FRONT, ORDERED)
    top = largest(x, 1)
    groups = tl.arange(0, GROUPS)
    place = CODES + row.to(tl.int64) * MAIN + at
    if KIND == "int4":
        scale = tl.maximum(top * factor, TINY, propagate_nan=tl.PropagateNan.ALL)
        codes = rounded(x, tl.div_rn(1.0, scale)[:, None], -8.0, 7.0)
        tl.store(place, codes.to(tl.float8e4nv), mask=at < MAIN)
        tl.store(SCALES + groups.to(tl.int64) * M + row, scale, mask=groups < MAIN // GROUP)
    else:
        scale = tl.maximum(largest(top, 0) * factor, TINY, propagate_nan=tl.PropagateNan.ALL)
        inverse = tl.div_rn(1.0, scale)
        if KIND == "int8":
            tl.store(place, rounded(x, inverse, -127.0, 127.0).to(tl.int8), mask=at < MAIN)
        else:
            tl.store(place, tl.minimum(tl.maximum(x * inverse, -448.0), 448.0).to(tl.float8e4nv), mask=at < MAIN)
        tl.store(SCALES + row, scale)
    if COUNT > 0:
        o = tl.arange(0, OB)
        x = _values(X, W, ORDER, row, MAIN + o, o < COUNT, r, STRIDE, K, FRONT, ORDERED)
        scale = tl.maximum(largest(x, 0) * (1.0 / 127.0), TINY, propagate_nan=tl.PropagateNan.ALL)
        codes = rounded(x, tl.div_rn(1.0, scale), -127.0, 127.0)
        tl.store(OUT + row.to(tl.int64) * COUNT + o, codes.to(tl.int8), mask=o < COUNT)
        tl.store(OUT_SCALES + row, scale)
