# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Products with packed 4-bit weights: `Y^T = W X^T`, weights unpacked into registers, activations from shared memory.

Notation: BN rows of weights by BM tokens a program; `lo` and `hi` the two halves of a block of 128 channels; sw and sx scales of
weights and activations. Hopper multiplies no 4-bit integers; its e4m3 product of a group's codes is exact (14 bits are kept in
the accumulator, 128 products of at most 56 need 13), and so is the bf16 product of the INT8 outliers (below 2^24). Once a group
the sums are scaled and added up in fp32.
"""

import triton
import triton.language as tl

from trainkit.kernels.lowbit._activation_kernels import TINY, largest, rounded

UNIT = tl.constexpr(512.0)
"""An unpacked weight is its code over 512."""


@triton.jit
def _fp8(p, ASM: tl.constexpr):
    """Both nibbles of bytes `p` as e4m3 numbers, codes over 512."""
    if ASM:
        lo, hi = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 a, b;
            and.b32 a, $2, 0x07070707;
            and.b32 b, $2, 0x08080808;
            shl.b32 b, b, 4;
            or.b32 $0, a, b;
            shr.u32 a, $2, 4;
            and.b32 a, a, 0x07070707;
            and.b32 b, $2, 0x80808080;
            or.b32 $1, a, b;
            }
            """,
            "=r,=r,r", [p], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4,
        )  # fmt: skip
    else:
        lo = (p & 7) | ((p & 8) << 4)
        hi = ((p >> 4) & 7) | (p & 128)
    return lo.to(tl.float8e4nv, bitcast=True), hi.to(tl.float8e4nv, bitcast=True)


@triton.jit
def _sixteen(p, FP16: tl.constexpr, ASM: tl.constexpr):
    """Both nibbles of bytes `p` as bf16 (or fp16) codes over 512."""
    lo, hi = _fp8(p, ASM)
    if FP16:
        return lo.to(tl.float16), hi.to(tl.float16)
    # e4m3 to bf16 goes through fp16, which holds all of it.
    return lo.to(tl.float16).to(tl.bfloat16), hi.to(tl.float16).to(tl.bfloat16)


@triton.jit
def _halves(p, KIND: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr):
    if KIND == "16":
        return _sixteen(p, FP16, ASM)
    else:
        return _fp8(p, ASM)


@triton.jit
def _tile(pid, M, N, BM: tl.constexpr, BN: tl.constexpr, SWIZZLE: tl.constexpr):
    """Which tile a program has: SWIZZLE tiles of tokens share the weights that lie in the L2 cache."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    band = pid // (SWIZZLE * columns)
    first = band * SWIZZLE
    height = tl.minimum(rows - first, SWIZZLE)
    at = pid % (SWIZZLE * columns)
    return first + at % height, at // height


@triton.jit
def linear(
    X, SX, XO, SXO, ORDER, W, SW, WO, SWO, BIAS, Y, PART, LOCK, M, N, STRIDE, factor,
    K: tl.constexpr, MAIN: tl.constexpr, O: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, FUSED: tl.constexpr,
    ORDERED: tl.constexpr, BIASED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr,
    SWIZZLE: tl.constexpr, STAGES: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One tile of Y `[M, N]`, or with SPLIT > 1 a share of its channels; the last of them adds up.

    KIND is what X holds: "int4" codes as e4m3 with a scale a group, "fp8" e4m3 with a scale a token, "16" bf16 or fp16 as it
    is. FUSED: X is the layer's 16-bit input `[M, K]`, quantised here ("int4" alone). W `[MAIN / 128, N, 64]`, SW `[MAIN /
    GROUP, N]`; WO `[N, O]` int8, SWO `[N]`. PART `[SPLIT, M, N]` fp32, LOCK a zero a tile.
    """
    pid_m, pid_n = _tile(tl.program_id(0), M, N, BM, BN, SWIZZLE)
    split = tl.program_id(1)
    BLOCKS: tl.constexpr = MAIN // 128
    SHARE: tl.constexpr = (BLOCKS + SPLIT - 1) // SPLIT
    first = split * SHARE
    last = tl.minimum(first + SHARE, BLOCKS)
    m = pid_m * BM + tl.arange(0, BM)
    n = pid_n * BN + tl.arange(0, BN)
    mc = tl.minimum(m, M - 1)  # beyond the edge: the last row again, never stored
    nc = tl.minimum(n, N - 1)
    FP16: tl.constexpr = Y.dtype.element_ty == tl.float16
    PER_TOKEN: tl.constexpr = KIND != "int4"
    WIDTH: tl.constexpr = 64 if GROUP >= 64 else GROUP  # channels of one dot
    j = tl.arange(0, WIDTH)
    x_rows = X + mc.to(tl.int64)[None, :] * STRIDE
    w_rows = W + nc[:, None] * 64 + j[None, :]
    y = tl.zeros([BN, BM], tl.float32)
    step = N.to(tl.int64) * 64
    PARTS: tl.constexpr = 64 // WIDTH
    for b in tl.range(first, last, num_stages=STAGES):
        for part in tl.static_range(PARTS):
            p = tl.load(w_rows + b * step + part * WIDTH)
            w_lo, w_hi = _halves(p, KIND, FP16, ASM)
            k_lo = b * 128 + part * WIDTH + j
            k_hi = k_lo + 64
            if GROUP == 128:
                g_lo = b
                g_hi = b
            else:
                g_lo = b * (128 // GROUP) + part
                g_hi = g_lo + 64 // GROUP
            if FUSED:
                if ORDERED:
                    c_lo = tl.load(ORDER + k_lo)
                    c_hi = tl.load(ORDER + k_hi)
                    x_lo = tl.load(x_rows + c_lo[:, None], mask=(c_lo >= 0)[:, None], other=0.0).to(tl.float32)
                    x_hi = tl.load(x_rows + c_hi[:, None], mask=(c_hi >= 0)[:, None], other=0.0).to(tl.float32)
                else:
                    x_lo = tl.load(x_rows + k_lo[:, None], mask=(k_lo < K)[:, None], other=0.0).to(tl.float32)
                    x_hi = tl.load(x_rows + k_hi[:, None], mask=(k_hi < K)[:, None], other=0.0).to(tl.float32)
                top_lo = largest(x_lo, 0)
                top_hi = largest(x_hi, 0)
                if GROUP == 128:
                    top_lo = tl.maximum(top_lo, top_hi, propagate_nan=tl.PropagateNan.ALL)
                    top_hi = top_lo
                sx_lo = tl.maximum(top_lo * factor, TINY, propagate_nan=tl.PropagateNan.ALL)
                sx_hi = tl.maximum(top_hi * factor, TINY, propagate_nan=tl.PropagateNan.ALL)
                x_lo = rounded(x_lo, tl.div_rn(1.0, sx_lo)[None, :], -8.0, 7.0).to(tl.float8e4nv)
                x_hi = rounded(x_hi, tl.div_rn(1.0, sx_hi)[None, :], -8.0, 7.0).to(tl.float8e4nv)
            else:
                if KIND == "16":
                    x_lo = tl.load(x_rows + k_lo[:, None], mask=(k_lo < K)[:, None], other=0.0)
                    x_hi = tl.load(x_rows + k_hi[:, None], mask=(k_hi < K)[:, None], other=0.0)
                else:
                    x_lo = tl.load(x_rows + k_lo[:, None])
                    x_hi = tl.load(x_rows + k_hi[:, None])
                if not PER_TOKEN:
                    sx_lo = tl.load(SX + g_lo * M + mc)
                    sx_hi = sx_lo
                    if GROUP != 128:
                        sx_hi = tl.load(SX + g_hi * M + mc)
            sw_lo = tl.load(SW + g_lo * N + nc).to(tl.float32) * UNIT
            sums = tl.dot(w_lo, x_lo)
            if GROUP == 128:
                sums = tl.dot(w_hi, x_hi, sums)
                if PER_TOKEN:
                    y += sums * sw_lo[:, None]
                else:
                    y += sums * (sw_lo[:, None] * sx_lo[None, :])
            else:
                sw_hi = tl.load(SW + g_hi * N + nc).to(tl.float32) * UNIT
                more = tl.dot(w_hi, x_hi)
                if PER_TOKEN:
                    y += sums * sw_lo[:, None]
                    y += more * sw_hi[:, None]
                else:
                    y += sums * (sw_lo[:, None] * sx_lo[None, :])
                    y += more * (sw_hi[:, None] * sx_hi[None, :])
    if KIND == "fp8":
        y *= tl.load(SX + mc)[None, :]
    if O > 0:
        if split == SPLIT - 1:
            o = tl.arange(0, 64)
            scale = tl.zeros([BM], tl.float32)
            if FUSED:
                for at in tl.static_range(0, O, 64):
                    channel = tl.load(ORDER + MAIN + at + o, mask=at + o < O, other=-1)
                    x = tl.load(x_rows + channel[:, None], mask=(channel >= 0)[:, None], other=0.0).to(tl.float32)
                    scale = tl.maximum(scale, largest(x, 0), propagate_nan=tl.PropagateNan.ALL)
                scale = tl.maximum(scale * (1.0 / 127.0), TINY, propagate_nan=tl.PropagateNan.ALL)
            else:
                scale = tl.load(SXO + mc)
            sums = tl.zeros([BN, BM], tl.float32)
            for at in tl.range(0, O, 64):
                inside = at + o < O
                w = tl.load(WO + nc[:, None] * O + (at + o)[None, :], mask=inside[None, :], other=0).to(tl.bfloat16)
                if FUSED:
                    channel = tl.load(ORDER + MAIN + at + o, mask=inside, other=-1)
                    x = tl.load(x_rows + channel[:, None], mask=(channel >= 0)[:, None], other=0.0).to(tl.float32)
                    x = rounded(x, tl.div_rn(1.0, scale)[None, :], -127.0, 127.0).to(tl.bfloat16)
                else:
                    rows = XO + mc.to(tl.int64)[None, :] * O
                    x = tl.load(rows + (at + o)[:, None], mask=inside[:, None], other=0).to(tl.bfloat16)
                sums = tl.dot(w, x, sums)
            y += sums * (tl.load(SWO + nc).to(tl.float32)[:, None] * scale[None, :])
    inside = (m < M)[None, :] & (n < N)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT > 1:
        size = M.to(tl.int64) * N
        tl.store(PART + split * size + at, y, mask=inside)
        tl.debug_barrier()
        lock = LOCK + tl.program_id(0)
        if tl.atomic_add(lock, 1, sem="acq_rel") == SPLIT - 1:
            # All shares, in their order: the sum does not depend on who came last.
            y = tl.zeros([BN, BM], tl.float32)
            for s in tl.static_range(SPLIT):
                y += tl.load(PART + s * size + at, mask=inside, other=0.0, cache_modifier=".cg")
            if BIASED:
                y += tl.load(BIAS + nc).to(tl.float32)[:, None]
            tl.store(Y + at, y.to(Y.dtype.element_ty), mask=inside)
            tl.store(lock, 0)
    else:
        if BIASED:
            y += tl.load(BIAS + nc).to(tl.float32)[:, None]
        tl.store(Y + at, y.to(Y.dtype.element_ty), mask=inside)
