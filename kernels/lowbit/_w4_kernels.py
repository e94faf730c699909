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
def _halves(p, KIND: tl.constexpr, FP16: tl.constexpr, ASM: tl.constexpr):
    lo, hi = _fp8(p, ASM)
    if KIND != "16":
        return lo, hi
    elif FP16:
        return lo.to(tl.float16), hi.to(tl.float16)
    else:
        # e4m3 to bf16 goes through fp16, which holds all of it.
        return lo.to(tl.float16).to(tl.bfloat16), hi.to(tl.float16).to(tl.bfloat16)


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
def _place(u, WIDTH: tl.constexpr):
    """The first channel of unit u's lower half; the upper is 64 further. A unit is a block, or half of one if WIDTH is 32."""
    # Not by division: the compiler would no longer know that addresses are aligned.
    if WIDTH == 64:
        return u * 128
    return (u >> 1) * 128 + (u & 1) * 32


@triton.jit
def _pair(S, u, STEP, at, UNITS: tl.constexpr, GROUP: tl.constexpr):
    """The scales of unit u's two halves in fp32; beyond the last unit, the last's."""
    u = tl.full([], 0, tl.int64) + tl.minimum(u, UNITS - 1)
    if GROUP == 128:
        lo = tl.load(S + u * STEP + at).to(tl.float32)
        return lo, lo
    g = _place(u, 64 if GROUP == 64 else 32) // GROUP
    lo = tl.load(S + g * STEP + at).to(tl.float32)
    return lo, tl.load(S + (g + 64 // GROUP) * STEP + at).to(tl.float32)


@triton.jit
def linear(
    X, SX, XO, SXO, W, SW, WO, SWO, BIAS, Y, PART, LOCK, M, N, STRIDE,
    K: tl.constexpr, MAIN: tl.constexpr, OUT: tl.constexpr, GROUP: tl.constexpr, KIND: tl.constexpr, BIASED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, SPLIT: tl.constexpr, SWIZZLE: tl.constexpr, STAGES: tl.constexpr,
    UNROLL: tl.constexpr, ASM: tl.constexpr, CHAINED: tl.constexpr,
):  # fmt: skip
    """One tile of Y `[M, N]`, or with SPLIT > 1 a share of its channels; the last of them adds up.

    KIND is what X holds: "int4" codes as e4m3 with a scale a group, "fp8" e4m3 with a scale a token, "16" bf16 or fp16 as it
    is. W `[MAIN / 128, N, 64]`, SW `[MAIN / GROUP, N]`; WO `[N, OUT]` int8, SWO `[N]`. PART `[SPLIT, M, N]` fp32, LOCK a zero
    a tile. UNROLL units of channels a turn.
    """
    pid_m, pid_n = _tile(tl.program_id(0), M, N, BM, BN, SWIZZLE)
    split = tl.program_id(1)
    m = pid_m * BM + tl.arange(0, BM)
    n = pid_n * BN + tl.arange(0, BN)
    mc = tl.minimum(m, M - 1)  # beyond the edge: the last row again, never stored
    nc = tl.minimum(n, N - 1)
    FP16: tl.constexpr = Y.dtype.element_ty == tl.float16
    WIDTH: tl.constexpr = 64 if GROUP >= 64 else GROUP  # channels of one dot, half of a unit
    UNITS: tl.constexpr = MAIN // (2 * WIDTH)
    SHARE: tl.constexpr = (UNITS + SPLIT - 1) // SPLIT
    first = tl.minimum(split * SHARE, UNITS)
    last = tl.minimum(first + SHARE, UNITS)
    j = tl.arange(0, WIDTH)
    x_rows = X + mc.to(tl.int64)[None, :] * STRIDE
    w_rows = W + nc[:, None] * 64 + j[None, :]
    y = tl.zeros([BN, BM], tl.float32)
    wide = tl.full([], 0, tl.int64)
    if CHAINED:
        # Started before the launch that makes X has ended.
        tl.extra.cuda.gdc_wait()
    # A unit ahead of their use; what is 32 bits wide is loaded early by the compiler.
    sw_lo, sw_hi = _pair(SW, first, N, nc, UNITS, GROUP)
    for start in tl.range(first, last, UNROLL, num_stages=STAGES):
        for i in tl.static_range(UNROLL):
            u = tl.minimum(start + i, UNITS - 1)
            if WIDTH == 64:
                p = tl.load(w_rows + (wide + u) * N * 64)
            else:
                p = tl.load(w_rows + ((wide + u) >> 1) * N * 64 + (u & 1) * 32)
            w_lo, w_hi = _halves(p, KIND, FP16, ASM)
            k = _place(u, WIDTH) + j
            if KIND == "16":
                x_lo = tl.load(x_rows + k[:, None], mask=(k < K)[:, None], other=0.0)
                x_hi = tl.load(x_rows + 64 + k[:, None], mask=(k + 64 < K)[:, None], other=0.0)
            else:
                x_lo = tl.load(x_rows + k[:, None])
                x_hi = tl.load(x_rows + 64 + k[:, None])
            if KIND == "int4":
                sx_lo, sx_hi = _pair(SX, u, M, mc, UNITS, GROUP)
            next_lo, next_hi = _pair(SW, start + i + 1, N, nc, UNITS, GROUP)
            unit = UNIT
            if UNROLL > 1:
                # A unit of the next share, or none: it counts nothing.
                unit = tl.where(start + i < last, UNIT, 0.0)
            sums = tl.dot(w_lo, x_lo)
            if GROUP == 128:
                sums = tl.dot(w_hi, x_hi, sums)
            if KIND == "int4":
                y += sums * (sw_lo * unit)[:, None] * sx_lo[None, :]
            else:
                y += sums * (sw_lo * unit)[:, None]
            if GROUP != 128:
                sums = tl.dot(w_hi, x_hi)
                if KIND == "int4":
                    y += sums * (sw_hi * unit)[:, None] * sx_hi[None, :]
                else:
                    y += sums * (sw_hi * unit)[:, None]
            sw_lo, sw_hi = next_lo, next_hi
    if KIND == "fp8":
        y *= tl.load(SX + mc)[None, :]
    if OUT > 0:  # noqa: SIM102 (a constant, and a number)
        if split == SPLIT - 1:
            o = tl.arange(0, 64)
            rows = XO + mc.to(tl.int64)[None, :] * OUT
            sums = tl.zeros([BN, BM], tl.float32)
            for at in tl.range(0, OUT, 64):
                inside = at + o < OUT
                w = tl.load(WO + nc[:, None] * OUT + (at + o)[None, :], mask=inside[None, :], other=0).to(tl.bfloat16)
                x = tl.load(rows + (at + o)[:, None], mask=inside[:, None], other=0).to(tl.bfloat16)
                sums = tl.dot(w, x, sums)
            y += sums * tl.load(SWO + nc).to(tl.float32)[:, None] * tl.load(SXO + mc)[None, :]
    inside = (m < M)[None, :] & (n < N)[:, None]
    at = m.to(tl.int64)[None, :] * N + n[:, None]
    if SPLIT > 1:
        size = wide + M * N
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
