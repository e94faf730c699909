# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""What forward and backward share: which tile a program has, which keys a tile sees, loads, dropout."""

import triton
import triton.language as tl

from trainkit.kernels._attention._dropout import HEAD as _HEAD
from trainkit.kernels._attention._dropout import MIX_A as _MIX_A
from trainkit.kernels._attention._dropout import MIX_B as _MIX_B
from trainkit.kernels._attention._dropout import ROW as _ROW

HEAD: tl.constexpr = tl.constexpr(_HEAD)
MIX_A: tl.constexpr = tl.constexpr(_MIX_A)
MIX_B: tl.constexpr = tl.constexpr(_MIX_B)
ROW: tl.constexpr = tl.constexpr(_ROW)


@triton.jit
def locate(TILES, CU_Q, CU_K, LSE, H, Sq, Sk, tiles, PACKED: tl.constexpr):
    """Find a program's tile: of `tiles` a head, of H heads a batch entry.

    Returns:
        Tile, batch entry or sequence, head, batch entry of the tensors, first row, first key, LSE at its first row,
        queries, keys.
    """
    pid = tl.program_id(0)
    tile = pid % tiles
    h = pid // tiles % H
    if PACKED:
        b = tl.load(TILES + 2 * tile)
        tile = tl.load(TILES + 2 * tile + 1)
        zb = tl.zeros([], tl.int64)
        q0 = tl.load(CU_Q + b).to(tl.int64)
        k0 = tl.load(CU_K + b).to(tl.int64)
        LSE += h.to(tl.int64) * Sq + q0
        Sq = tl.load(CU_Q + b + 1) - tl.load(CU_Q + b)
        Sk = tl.load(CU_K + b + 1) - tl.load(CU_K + b)
    else:
        # The last queries see the most keys under a causal mask: they start first.
        tile = tiles - 1 - tile
        b = pid // tiles // H
        zb = b.to(tl.int64)
        q0 = tl.zeros([], tl.int64)
        k0 = q0
        LSE += (zb * H + h) * Sq
    return tile, b, h, zb, q0, k0, LSE, Sq, Sk


@triton.jit
def load_rows(X, first, count, stride, B: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MASKED: tl.constexpr):
    """Rows [first, first + B) of a matrix, zeros beyond `count` rows and D columns."""
    rows = first + tl.arange(0, B)
    cols = tl.arange(0, BD)
    at = X + rows[:, None].to(tl.int64) * stride + cols[None, :]
    if MASKED and D != BD:
        return tl.load(at, mask=(rows < count)[:, None] & (cols < D)[None, :], other=0.0)
    elif MASKED:
        return tl.load(at, mask=(rows < count)[:, None], other=0.0)
    elif D != BD:
        return tl.load(at, mask=(cols < D)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def visible(q, k, Sk, off, w, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Whether query q sees key k, mask_mod aside."""
    gap = q + off - k
    seen = (k < Sk) & (gap == gap)
    if CAUSAL:
        seen = seen & (gap >= 0)
    if WINDOW:
        seen = seen & (tl.abs(gap) < w)
    return seen


@triton.jit
def key_range(m0, BM: tl.constexpr, BN: tl.constexpr, Sk, off, w, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Keys that queries [m0, m0 + BM) see: some in [lo, hi), every query all of [full_lo, full_hi)."""
    lo = 0
    hi = Sk
    full_lo = 0
    full_hi = Sk // BN * BN
    if CAUSAL:
        hi = tl.minimum(hi, m0 + BM + off)
        full_hi = tl.minimum(full_hi, tl.maximum(m0 + off + 1, 0) // BN * BN)
    if WINDOW:
        lo = tl.maximum(m0 + off - w + 1, 0) // BN * BN
        full_lo = tl.cdiv(tl.maximum(m0 + BM + off - w, 0), BN) * BN
        if not CAUSAL:
            hi = tl.minimum(hi, m0 + BM - 1 + off + w)
            full_hi = tl.minimum(full_hi, tl.maximum(m0 + off + w, 0) // BN * BN)
    hi = tl.maximum(hi, lo)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def query_range(n0, BN: tl.constexpr, BM: tl.constexpr, Sq, off, w, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """Queries that see keys [n0, n0 + BN): some in [lo, hi), each of [full_lo, full_hi) all of them."""
    lo = 0
    hi = Sq
    full_lo = 0
    full_hi = Sq // BM * BM
    if CAUSAL:
        lo = tl.maximum(n0 - off, 0) // BM * BM
        full_lo = tl.cdiv(tl.maximum(n0 + BN - 1 - off, 0), BM) * BM
    if WINDOW:
        hi = tl.minimum(hi, n0 + BN - 1 + w - off)
        full_hi = tl.minimum(full_hi, tl.maximum(n0 + w - off, 0) // BM * BM)
        if not CAUSAL:
            lo = tl.maximum(n0 - w - off + 1, 0) // BM * BM
            full_lo = tl.cdiv(tl.maximum(n0 + BN - w - off, 0), BM) * BM
    hi = tl.maximum(hi, lo)
    full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
    return lo, full_lo, full_hi, hi


@triton.jit
def mix(x):
    """The 32-bit hash of the dropout mask."""
    x = (x ^ (x >> 16)) * MIX_A
    x = (x ^ (x >> 15)) * MIX_B
    return x ^ (x >> 16)


@triton.jit
def keep(seed, threshold, b_head, q, k):
    """Which probabilities the dropout keeps; `b_head` is b * Hq + h."""
    row = mix(mix(seed.to(tl.uint32) + b_head.to(tl.uint32) * HEAD) ^ (q.to(tl.uint32) * ROW))
    return (mix(row ^ k.to(tl.uint32)) >> 8) >= threshold.to(tl.uint32)
