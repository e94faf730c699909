# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""The forward template: one body, with the score and the mask as functions that a variant brings."""

import triton
import triton.language as tl

from trainkit.kernels._attention._triton_tiles import keep, key_range, load_rows, locate, visible

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def span(
    acc, m, den, q, K, V, start, stop, BLOCKS, b, h, bh, rows, Sk, off, w, qk_scale, seed, threshold, keep_scale,
    sks, svs,
    score_args, mask_args,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SIGMOID: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    LISTED: tl.constexpr, PRECISION: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Fold the keys [start, stop) into (acc, m, den); with LISTED, the key blocks BLOCKS[start:stop] instead."""
    step: tl.constexpr = 1 if LISTED else BN
    for at in range(start, stop, step):
        n0 = at
        if LISTED:
            n0 = tl.load(BLOCKS + at) * BN
        cols = n0 + tl.arange(0, BN)
        k = load_rows(K, n0, Sk, sks, BN, D, BD, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        qi = rows[:, None]
        kj = cols[None, :]
        if SCORE is not None:
            # Padding rows and keys read no table beyond its end.
            s = SCORE(s * qk_scale, b, h, qi, tl.minimum(kj, Sk - 1), off, score_args) * LOG2E
        else:
            s = s * qk_scale
        if MASKED:
            seen = visible(qi, kj, Sk, off, w, CAUSAL, WINDOW)
            if MASK is not None:
                seen = seen & MASK(b, h, qi, tl.minimum(kj, Sk - 1), off, mask_args)
            s = tl.where(seen, s, float("-inf"))
        if SIGMOID:
            p = 1.0 / (1.0 + tl.exp2(-s))
        else:
            m_new = tl.maximum(m, tl.max(s, 1))
            top = tl.where(m_new == float("-inf"), 0.0, m_new)
            p = tl.exp2(s - top[:, None])
            fade = tl.exp2(m - top)
            den = den * fade + tl.sum(p, 1)
            acc = acc * fade[:, None]
            m = m_new
        if DROPOUT:
            p = tl.where(keep(seed, threshold, bh, qi, kj), p * keep_scale, 0.0)
        v = load_rows(V, n0, Sk, svs, BN, DV, BDV, MASKED)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, m, den


@triton.jit(do_not_specialize=["Sq", "Sk", "w", "seed", "threshold", "tiles"])
def forward(
    Q, K, V, OUT, LSE, SINKS, TILES, CU_Q, CU_K, BLOCKS, COUNTS, FULL,
    sqb, sqs, sqh, skb, sks, skh, svb, svs, svh, sob, sos, soh, sbb, sbh, NB,
    Hq, Sq, Sk, w, scale, seed, threshold, keep_scale, score_args, mask_args, tiles,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SIGMOID: tl.constexpr,
    DROPOUT: tl.constexpr, SINK: tl.constexpr, PACKED: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr,
    SCORE: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head.

    BLOCKS `[B|1, H|1, tiles, NB]` lists the key blocks of a tile, those seen whole first (FULL of COUNTS of them).
    """
    tile, b, h, zb, q0, k0, LSE, Sq, Sk = locate(TILES, CU_Q, CU_K, LSE, Hq, Sq, Sk, tiles, PACKED)
    m0 = tile * BM
    off = Sk - Sq
    bh = b * Hq + h
    offsets = m0 + tl.arange(0, BM)
    Q += zb * sqb + h.to(tl.int64) * sqh + q0 * sqs
    K += zb * skb + (h // GROUP).to(tl.int64) * skh + k0 * sks
    V += zb * svb + (h // GROUP).to(tl.int64) * svh + k0 * svs
    q = load_rows(Q, m0, Sq, sqs, BM, D, BD, True)
    rows = tl.minimum(offsets, Sq - 1)
    m = tl.full([BM], float("-inf"), tl.float32)
    den = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BDV], tl.float32)
    qk_scale = scale if SCORE is not None else scale * LOG2E
    if LISTED:
        row = (b * sbb + h * sbh) + tile
        BLOCKS += row.to(tl.int64) * NB
        full = tl.load(FULL + row)
        count = tl.load(COUNTS + row)
        acc, m, den = span(
            acc, m, den, q, K, V, 0, full, BLOCKS, b, h, bh, rows, Sk, off, w, qk_scale, seed, threshold, keep_scale,
            sks, svs,
            score_args, mask_args, D, DV, BD, BDV, BN, CAUSAL, WINDOW, SIGMOID, DROPOUT, False, True, PRECISION,
            SCORE, MASK,
        )  # fmt: skip
        acc, m, den = span(
            acc, m, den, q, K, V, full, count, BLOCKS, b, h, bh, rows, Sk, off, w, qk_scale, seed, threshold,
            keep_scale, sks, svs,
            score_args, mask_args, D, DV, BD, BDV, BN, CAUSAL, WINDOW, SIGMOID, DROPOUT, True, True, PRECISION,
            SCORE, MASK,
        )  # fmt: skip
    else:
        lo, full_lo, full_hi, hi = key_range(m0, BM, BN, Sk, off, w, CAUSAL, WINDOW)
        if MASK is not None:
            full_lo = lo
            full_hi = lo
        if WINDOW:
            acc, m, den = span(
                acc, m, den, q, K, V, lo, full_lo, BLOCKS, b, h, bh, rows, Sk, off, w, qk_scale, seed, threshold,
                keep_scale, sks,
                svs, score_args, mask_args, D, DV, BD, BDV, BN, CAUSAL, WINDOW, SIGMOID, DROPOUT, True, False,
                PRECISION,
                SCORE, MASK,
            )  # fmt: skip
        if MASK is None:
            acc, m, den = span(
                acc, m, den, q, K, V, full_lo, full_hi, BLOCKS, b, h, bh, rows, Sk, off, w, qk_scale, seed,
                threshold, keep_scale,
                sks, svs, score_args, mask_args, D, DV, BD, BDV, BN, CAUSAL, WINDOW, SIGMOID, DROPOUT, False, False,
                PRECISION, SCORE, MASK,
            )  # fmt: skip
        acc, m, den = span(
            acc, m, den, q, K, V, tl.maximum(full_lo, full_hi), hi, BLOCKS, b, h, bh, rows, Sk, off, w, qk_scale,
            seed, threshold,
            keep_scale, sks, svs, score_args, mask_args, D, DV, BD, BDV, BN, CAUSAL, WINDOW, SIGMOID, DROPOUT, True,
            False,
            PRECISION, SCORE, MASK,
        )  # fmt: skip
    inside = offsets < Sq
    if not SIGMOID:
        # Not by the maximum, which passes over NaN: a NaN in the scores must come out.
        empty = den == 0.0
        top = tl.where(empty, 0.0, m)
        if SINK:
            sink = tl.load(SINKS + h).to(tl.float32) * LOG2E
            raised = tl.maximum(top, sink)
            fade = tl.exp2(top - raised)
            acc = acc * fade[:, None]
            den = den * fade + tl.exp2(sink - raised)
            top = raised
        total = tl.where(empty, 1.0, den)
        acc = tl.where(empty[:, None], 0.0, acc / total[:, None])
        lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
        tl.store(LSE + offsets, lse, mask=inside)
    dv = tl.arange(0, BDV)
    OUT += zb * sob + h.to(tl.int64) * soh + q0 * sos
    at = OUT + offsets[:, None].to(tl.int64) * sos + dv[None, :]
    tl.store(at, acc.to(OUT.dtype.element_ty), mask=inside[:, None] & (dv < DV)[None, :])
