# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""The backward template: dK and dV a tile of keys at a time, dQ a tile of queries at a time; no atomics, same bits."""

import triton
import triton.language as tl

from trainkit.kernels._attention._triton_forward import LOG2E
from trainkit.kernels._attention._triton_tiles import keep, key_range, load_rows, locate, query_range, visible


@triton.jit
def delta(OUT, DO, DLSE, DELTA, sob, sos, soh, sdb, sds, sdh, Hq, Sq, tiles, DV: tl.constexpr, BDV: tl.constexpr,
          BM: tl.constexpr, GRAD_LSE: tl.constexpr):  # fmt: skip
    """DELTA = rowsum(OUT * dO) - dLSE, fp32 `[B, H, Sq]`."""
    m0 = tl.program_id(0) % tiles * BM
    z = tl.program_id(0) // tiles
    h = (z % Hq).to(tl.int64)
    b = (z // Hq).to(tl.int64)
    o = load_rows(OUT + b * sob + h * soh, m0, Sq, sos, BM, DV, BDV, True).to(tl.float32)
    do = load_rows(DO + b * sdb + h * sdh, m0, Sq, sds, BM, DV, BDV, True).to(tl.float32)
    rows = m0 + tl.arange(0, BM)
    at = (b * Hq + h) * Sq + rows
    total = tl.sum(o * do, 1)
    if GRAD_LSE:
        total -= tl.load(DLSE + at, mask=rows < Sq, other=0.0)
    tl.store(DELTA + at, total, mask=rows < Sq)


@triton.jit
def load_lse(LSE, rows, Sq):
    """Row statistics in base 2; +inf where a row has no keys or is padding, so that its weights are 0."""
    lse = tl.load(LSE + rows, mask=rows < Sq, other=float("inf")) * LOG2E
    return tl.where(lse == float("-inf"), float("inf"), lse)


@triton.jit
def weights(s, lse, SIGMOID: tl.constexpr):
    """Probabilities from base-2 scores."""
    if SIGMOID:
        return 1.0 / (1.0 + tl.exp2(-s))
    else:
        return tl.exp2(s - lse)


@triton.jit
def key_span(
    dk, dv, k, v, Q, DO, LSE, DELTA, start, stop, BLOCKS, b, h, bh, cols, Sq, Sk, off, w, scale, seed, threshold,
    keep_scale, sqs, sds, score_args, mask_args,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SIGMOID: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    LISTED: tl.constexpr, PRECISION: tl.constexpr, SCORE: tl.constexpr, GRAD: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Add to (dk, dv) of one tile of keys what the queries [start, stop), or listed blocks of them, bring."""
    step: tl.constexpr = 1 if LISTED else BM
    for at in range(start, stop, step):
        m0 = at
        if LISTED:
            m0 = tl.load(BLOCKS + at) * BM
        rows = m0 + tl.arange(0, BM)
        q = load_rows(Q, m0, Sq, sqs, BM, D, BD, MASKED)
        do = load_rows(DO, m0, Sq, sds, BM, DV, BDV, MASKED)
        lse = load_lse(LSE, rows, Sq)
        total = tl.load(DELTA + rows, mask=rows < Sq, other=0.0)
        qi = tl.minimum(rows, Sq - 1)[None, :]
        kj = tl.minimum(cols, Sk - 1)[:, None]
        raw = tl.dot(k, tl.trans(q), input_precision=PRECISION) * scale
        s = raw
        if SCORE is not None:
            s = SCORE(raw, b, h, qi, kj, off, score_args)
        s = s * LOG2E
        if MASKED:
            seen = visible(qi, cols[:, None], Sk, off, w, CAUSAL, WINDOW) & (rows < Sq)[None, :]
            if MASK is not None:
                seen = seen & MASK(b, h, qi, kj, off, mask_args)
            s = tl.where(seen, s, float("-inf"))
        p = weights(s, lse[None, :], SIGMOID)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        dropped = p
        if DROPOUT:
            stays = keep(seed, threshold, bh, qi, kj)
            dropped = tl.where(stays, p * keep_scale, 0.0)
            dp = tl.where(stays, dp * keep_scale, 0.0)
        dv = tl.dot(dropped.to(do.dtype), do, dv, input_precision=PRECISION)
        if SIGMOID:
            ds = p * (1.0 - p) * dp
        else:
            ds = p * (dp - total[None, :])
        if GRAD is not None:
            ds = GRAD(raw, ds, b, h, qi, kj, off, p > 0.0, score_args, score_args, False)
            if MASKED:
                ds = tl.where(seen, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["Sq", "Sk", "w", "seed", "threshold", "tiles"])
def backward_keys(
    Q, K, V, DO, LSE, DELTA, DK, DV_OUT, TILES, CU_Q, CU_K, BLOCKS, COUNTS, FULL,
    sqb, sqs, sqh, skb, sks, skh, svb, svs, svh, sdb, sds, sdh, sgb, sgs, sgh, swb, sws, swh, sbb, sbh, NB,
    Hq, Sq, Sk, w, scale, seed, threshold, keep_scale, score_args, mask_args, tiles,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SIGMOID: tl.constexpr,
    DROPOUT: tl.constexpr, PACKED: tl.constexpr, LISTED: tl.constexpr, PRECISION: tl.constexpr,
    SCORE: tl.constexpr, GRAD: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV of BN keys of one key head: over the query heads of its group, and over the queries that see them.

    BLOCKS lists a key tile's query blocks, as in `forward`; DELTA and LSE are `[B, Hq, Sq]`.
    """
    total_q = Sq
    tile, b, kv_head, zb, q0, k0, LSE, Sq, Sk = locate(TILES, CU_Q, CU_K, LSE, Hq // GROUP, Sq, Sk, tiles, PACKED)
    # `locate` counted rows by the key head; statistics are by query head.
    LSE -= (zb * (Hq // GROUP) + kv_head) * total_q + q0
    stats = zb * Hq * total_q + q0
    if not PACKED:
        tile = tiles - 1 - tile
    n0 = tile * BN
    off = Sk - Sq
    cols = n0 + tl.arange(0, BN)
    K += zb * skb + kv_head.to(tl.int64) * skh + k0 * sks
    V += zb * svb + kv_head.to(tl.int64) * svh + k0 * svs
    k = load_rows(K, n0, Sk, sks, BN, D, BD, True)
    v = load_rows(V, n0, Sk, svs, BN, DV, BDV, True)
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)
    for g in range(GROUP):
        h = kv_head * GROUP + g
        bh = b * Hq + h
        h64 = h.to(tl.int64)
        q = Q + zb * sqb + h64 * sqh + q0 * sqs
        do = DO + zb * sdb + h64 * sdh + q0 * sds
        lse = LSE + stats + h64 * total_q
        total = DELTA + stats + h64 * total_q
        if LISTED:
            row = (b * sbb + h * sbh) + tile
            blocks = BLOCKS + row.to(tl.int64) * NB
            full = tl.load(FULL + row)
            count = tl.load(COUNTS + row)
            dk, dv = key_span(
                dk, dv, k, v, q, do, lse, total, 0, full, blocks, b, h, bh, cols, Sq, Sk, off, w, scale, seed,
                threshold,
                keep_scale, sqs, sds, score_args, mask_args, D, DV, BD, BDV, BM, CAUSAL, WINDOW, SIGMOID, DROPOUT,
                False,
                True, PRECISION, SCORE, GRAD, MASK,
            )  # fmt: skip
            dk, dv = key_span(
                dk, dv, k, v, q, do, lse, total, full, count, blocks, b, h, bh, cols, Sq, Sk, off, w, scale, seed,
                threshold,
                keep_scale, sqs, sds, score_args, mask_args, D, DV, BD, BDV, BM, CAUSAL, WINDOW, SIGMOID, DROPOUT, True,
                True, PRECISION, SCORE, GRAD, MASK,
            )  # fmt: skip
        else:
            lo, full_lo, full_hi, hi = query_range(n0, BN, BM, Sq, off, w, CAUSAL, WINDOW)
            if MASK is not None:
                full_lo = lo
                full_hi = lo
            if CAUSAL or WINDOW:
                dk, dv = key_span(
                    dk, dv, k, v, q, do, lse, total, lo, full_lo, BLOCKS, b, h, bh, cols, Sq, Sk, off, w, scale, seed,
                    threshold, keep_scale, sqs, sds, score_args, mask_args, D, DV, BD, BDV, BM, CAUSAL, WINDOW, SIGMOID,
                    DROPOUT, True, False, PRECISION, SCORE, GRAD, MASK,
                )  # fmt: skip
            if MASK is None:
                dk, dv = key_span(
                    dk, dv, k, v, q, do, lse, total, full_lo, full_hi, BLOCKS, b, h, bh, cols, Sq, Sk, off, w, scale,
                    seed,
                    threshold, keep_scale, sqs, sds, score_args, mask_args, D, DV, BD, BDV, BM, CAUSAL, WINDOW, SIGMOID,
                    DROPOUT, False, False, PRECISION, SCORE, GRAD, MASK,
                )  # fmt: skip
            dk, dv = key_span(
                dk, dv, k, v, q, do, lse, total, tl.maximum(full_lo, full_hi), hi, BLOCKS, b, h, bh, cols, Sq, Sk,
                off, w,
                scale, seed, threshold, keep_scale, sqs, sds, score_args, mask_args, D, DV, BD, BDV, BM, CAUSAL, WINDOW,
                SIGMOID, DROPOUT, True, False, PRECISION, SCORE, GRAD, MASK,
            )  # fmt: skip
    inside = (cols < Sk)[:, None]
    d = tl.arange(0, BD)[None, :]
    at = zb * sgb + kv_head.to(tl.int64) * sgh + (k0 + cols[:, None]) * sgs + d
    tl.store(DK + at, (dk * scale).to(DK.dtype.element_ty), mask=inside & (d < D))
    e = tl.arange(0, BDV)[None, :]
    at = zb * swb + kv_head.to(tl.int64) * swh + (k0 + cols[:, None]) * sws + e
    tl.store(DV_OUT + at, dv.to(DV_OUT.dtype.element_ty), mask=inside & (e < DV))


@triton.jit
def query_span(
    dq, q, do, lse, total, K, V, start, stop, BLOCKS, b, h, bh, rows, inside, Sk, off, w, scale, seed, threshold,
    keep_scale, sks, svs, score_args, mask_args, table_grads,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr, BN: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SIGMOID: tl.constexpr, DROPOUT: tl.constexpr, MASKED: tl.constexpr,
    LISTED: tl.constexpr, TABLES: tl.constexpr, PRECISION: tl.constexpr, SCORE: tl.constexpr, GRAD: tl.constexpr,
    MASK: tl.constexpr,
):  # fmt: skip
    """Add to dq of one tile of queries what the keys [start, stop), or listed blocks of them, bring."""
    step: tl.constexpr = 1 if LISTED else BN
    for at in range(start, stop, step):
        n0 = at
        if LISTED:
            n0 = tl.load(BLOCKS + at) * BN
        cols = n0 + tl.arange(0, BN)
        k = load_rows(K, n0, Sk, sks, BN, D, BD, MASKED)
        v = load_rows(V, n0, Sk, svs, BN, DV, BDV, MASKED)
        qi = rows[:, None]
        kj = tl.minimum(cols, Sk - 1)[None, :]
        raw = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
        s = raw
        if SCORE is not None:
            s = SCORE(raw, b, h, qi, kj, off, score_args)
        s = s * LOG2E
        if MASKED:
            seen = visible(qi, cols[None, :], Sk, off, w, CAUSAL, WINDOW)
            if MASK is not None:
                seen = seen & MASK(b, h, qi, kj, off, mask_args)
            s = tl.where(seen, s, float("-inf"))
        p = weights(s, lse[:, None], SIGMOID)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        if DROPOUT:
            dp = tl.where(keep(seed, threshold, bh, qi, kj), dp * keep_scale, 0.0)
        if SIGMOID:
            ds = p * (1.0 - p) * dp
        else:
            ds = p * (dp - total[:, None])
        if GRAD is not None:
            valid = inside & (cols < Sk)[None, :]
            if MASKED:
                valid = valid & seen
            ds = GRAD(raw, ds, b, h, qi, kj, off, valid, score_args, table_grads, TABLES)
            if MASKED:
                ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=["Sq", "Sk", "w", "seed", "threshold", "tiles"])
def backward_queries(
    Q, K, V, DO, LSE, DELTA, DQ, TILES, CU_Q, CU_K, BLOCKS, COUNTS, FULL,
    sqb, sqs, sqh, skb, sks, skh, svb, svs, svh, sdb, sds, sdh, sgb, sgs, sgh, sbb, sbh, NB,
    Hq, Sq, Sk, w, scale, seed, threshold, keep_scale, score_args, mask_args, table_grads, tiles,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SIGMOID: tl.constexpr,
    DROPOUT: tl.constexpr, PACKED: tl.constexpr, LISTED: tl.constexpr, TABLES: tl.constexpr, PRECISION: tl.constexpr,
    SCORE: tl.constexpr, GRAD: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """Compute dQ of BM queries of one head, and with TABLES the gradients of the score's captured tensors."""
    total_q = Sq
    tile, b, h, zb, q0, k0, LSE, Sq, Sk = locate(TILES, CU_Q, CU_K, LSE, Hq, Sq, Sk, tiles, PACKED)
    if PACKED:
        DELTA += h.to(tl.int64) * total_q + q0
    else:
        DELTA += (zb * Hq + h) * Sq
    m0 = tile * BM
    off = Sk - Sq
    bh = b * Hq + h
    offsets = m0 + tl.arange(0, BM)
    K += zb * skb + (h // GROUP).to(tl.int64) * skh + k0 * sks
    V += zb * svb + (h // GROUP).to(tl.int64) * svh + k0 * svs
    q = load_rows(Q + zb * sqb + h.to(tl.int64) * sqh + q0 * sqs, m0, Sq, sqs, BM, D, BD, True)
    do = load_rows(DO + zb * sdb + h.to(tl.int64) * sdh + q0 * sds, m0, Sq, sds, BM, DV, BDV, True)
    lse = load_lse(LSE, offsets, Sq)
    total = tl.load(DELTA + offsets, mask=offsets < Sq, other=0.0)
    rows = tl.minimum(offsets, Sq - 1)
    inside = (offsets < Sq)[:, None]
    dq = tl.zeros([BM, BD], tl.float32)
    if LISTED:
        row = (b * sbb + h * sbh) + tile
        blocks = BLOCKS + row.to(tl.int64) * NB
        full = tl.load(FULL + row)
        count = tl.load(COUNTS + row)
        dq = query_span(
            dq, q, do, lse, total, K, V, 0, full, blocks, b, h, bh, rows, inside, Sk, off, w, scale, seed, threshold,
            keep_scale, sks, svs, score_args, mask_args, table_grads, D, DV, BD, BDV, BN, CAUSAL, WINDOW, SIGMOID,
            DROPOUT,
            False, True, TABLES, PRECISION, SCORE, GRAD, MASK,
        )  # fmt: skip
        dq = query_span(
            dq, q, do, lse, total, K, V, full, count, blocks, b, h, bh, rows, inside, Sk, off, w, scale, seed,
            threshold,
            keep_scale, sks, svs, score_args, mask_args, table_grads, D, DV, BD, BDV, BN, CAUSAL, WINDOW, SIGMOID,
            DROPOUT,
            True, True, TABLES, PRECISION, SCORE, GRAD, MASK,
        )  # fmt: skip
    else:
        lo, full_lo, full_hi, hi = key_range(m0, BM, BN, Sk, off, w, CAUSAL, WINDOW)
        if MASK is not None:
            full_lo = lo
            full_hi = lo
        if WINDOW:
            dq = query_span(
                dq, q, do, lse, total, K, V, lo, full_lo, BLOCKS, b, h, bh, rows, inside, Sk, off, w, scale, seed,
                threshold,
                keep_scale, sks, svs, score_args, mask_args, table_grads, D, DV, BD, BDV, BN, CAUSAL, WINDOW, SIGMOID,
                DROPOUT, True, False, TABLES, PRECISION, SCORE, GRAD, MASK,
            )  # fmt: skip
        if MASK is None:
            dq = query_span(
                dq, q, do, lse, total, K, V, full_lo, full_hi, BLOCKS, b, h, bh, rows, inside, Sk, off, w, scale, seed,
                threshold, keep_scale, sks, svs, score_args, mask_args, table_grads, D, DV, BD, BDV, BN, CAUSAL, WINDOW,
                SIGMOID, DROPOUT, False, False, TABLES, PRECISION, SCORE, GRAD, MASK,
            )  # fmt: skip
        dq = query_span(
            dq, q, do, lse, total, K, V, tl.maximum(full_lo, full_hi), hi, BLOCKS, b, h, bh, rows, inside, Sk, off,
            w, scale,
            seed, threshold, keep_scale, sks, svs, score_args, mask_args, table_grads, D, DV, BD, BDV, BN, CAUSAL,
            WINDOW,
            SIGMOID, DROPOUT, True, False, TABLES, PRECISION, SCORE, GRAD, MASK,
        )  # fmt: skip
    d = tl.arange(0, BD)[None, :]
    at = zb * sgb + h.to(tl.int64) * sgh + (q0 + offsets[:, None]) * sgs + d
    tl.store(DQ + at, (dq * scale).to(DQ.dtype.element_ty), mask=inside & (d < D))
