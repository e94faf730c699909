# mypy: ignore-errors
# (Triton's and Gluon's language, which Python's types do not describe.)
"""Which keys queries see, once for both dialects: blocks of a tile, and pairs of a block."""

import triton.language as triton_language


def ranges(jit, tl=triton_language):
    """The functions `key_range`, `query_range` and `visible` in a dialect.

    With off = Sk - Sq, query q sees key k iff 0 <= q + off - k if CAUSAL, and |q + off - k| < w with a WINDOW.

    Args:
        jit: the dialect's decorator.
        tl: its language; Triton's interpreter wants its own to be found in this module.
    """

    @jit
    def key_range(m0, BM: tl.constexpr, BN: tl.constexpr, Sk, off, w, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
        """Blocks of BN keys of queries [m0, m0 + BM): some are seen in [lo, hi), all by each query in [full_lo, full_hi)."""
        lo = 0
        hi = Sk
        full_lo = 0
        full_hi = Sk // BN
        if CAUSAL:
            hi = tl.minimum(hi, tl.maximum(m0 + BM + off, 0))
            full_hi = tl.minimum(full_hi, tl.maximum(m0 + off + 1, 0) // BN)
        if WINDOW:
            lo = tl.maximum(m0 + off - w + 1, 0) // BN
            full_lo = tl.cdiv(tl.maximum(m0 + BM + off - w, 0), BN)
            if not CAUSAL:
                hi = tl.minimum(hi, tl.maximum(m0 + BM - 1 + off + w, 0))
                full_hi = tl.minimum(full_hi, tl.maximum(m0 + off + w, 0) // BN)
        hi = tl.maximum(tl.cdiv(hi, BN), lo)
        if WINDOW:
            full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
        full_hi = tl.minimum(tl.maximum(full_hi, full_lo), hi)
        return lo, full_lo, full_hi, hi

    @jit
    def query_range(n0, BN: tl.constexpr, BM: tl.constexpr, Sq, off, w, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
        """Blocks of BM queries of keys [n0, n0 + BN): some see them in [lo, hi), each all of them in [full_lo, full_hi)."""
        lo = 0
        hi = Sq
        full_lo = 0
        full_hi = Sq // BM
        if CAUSAL:
            lo = tl.maximum(n0 - off, 0) // BM
            full_lo = tl.cdiv(tl.maximum(n0 + BN - 1 - off, 0), BM)
        if WINDOW:
            hi = tl.minimum(hi, tl.maximum(n0 + BN - 1 + w - off, 0))
            full_hi = tl.minimum(full_hi, tl.maximum(n0 + w - off, 0) // BM)
            if not CAUSAL:
                lo = tl.maximum(n0 - w - off + 1, 0) // BM
                full_lo = tl.cdiv(tl.maximum(n0 + BN - w - off, 0), BM)
        hi = tl.maximum(tl.cdiv(hi, BM), lo)
        if CAUSAL or WINDOW:
            full_lo = tl.minimum(tl.maximum(full_lo, lo), hi)
        full_hi = tl.minimum(tl.maximum(full_hi, full_lo), hi)
        return lo, full_lo, full_hi, hi

    @jit
    def visible(q, k, Sk, off, w, CAUSAL, WINDOW):
        """Whether query q sees key k, mask_mod aside."""
        gap = q + off - k
        seen = (k < Sk) & (gap == gap)
        if CAUSAL:
            seen = seen & (gap >= 0)
        if WINDOW:
            seen = seen & (gap < w) & (gap > -w)
        return seen

    return key_range, query_range, visible
