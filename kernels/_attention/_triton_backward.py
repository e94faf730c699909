# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""The backward template: dK and dV a tile of keys at a time, dQ a tile of queries at a time; no atomics, same bits."""

import triton
import triton.language as tl

from trainkit.kernels._attention._triton_forward import LOG2E
from trainkit.kernels._attention._triton_tiles import (
    Problem,
    block_spans,
    first_of,
    keep,
    key_rows,
    load_rows,
    output_rows,
    query_range,
    rows_of,
    store_rows,
    take,
    visible,
)


@triton.jit
def delta(OUT, DO, DLSE, DELTA, sob, sos, soh, sdb, sds, sdh, Hq, Sq, tiles, DV: tl.constexpr, BDV: tl.constexpr,
          BM: tl.constexpr, GRAD_LSE: tl.constexpr):  # fmt: skip
    """DELTA = rowsum(OUT * dO) - dLSE, fp32 `[B, H, Sq]`."""
    m0 = tl.program_id(0) % tiles * BM
    z = tl.program_id(0) // tiles
    h = z % Hq
    b = (z // Hq).to(tl.int64)
    first = tl.zeros([], tl.int64)
    o = load_rows(rows_of((OUT, sob, sos, soh), b, first, h), m0, Sq, BM, DV, BDV, 0, True).to(tl.float32)
    do = load_rows(rows_of((DO, sdb, sds, sdh), b, first, h), m0, Sq, BM, DV, BDV, 0, True).to(tl.float32)
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
def score_of(raw, qi, kj, problem, c: tl.constexpr):
    """Scores in base 2 from products, scaled."""
    if c.SCORE is not None:
        return c.SCORE(raw, problem.b, problem.h, qi, kj, problem.off, problem.score_args) * LOG2E
    else:
        return raw * LOG2E


@triton.jit
def seen_of(qi, k, kj, problem, c: tl.constexpr):
    """Which queries see which keys k, of which kj are those kept inside."""
    seen = visible(qi, k, problem.Sk, problem.off, problem.w, c.CAUSAL, c.WINDOW)
    if c.MASK is not None:
        seen = seen & c.MASK(problem.b, problem.h, qi, kj, problem.off, problem.mask_args)
    return seen


@triton.jit
def gradient_of(s, dp, lse, total, c: tl.constexpr):
    """Weights from base-2 scores, and the scores' gradient before the score's own derivative."""
    if c.SIGMOID:
        p = 1.0 / (1.0 + tl.exp2(-s))
        return p, p * (1.0 - p) * dp
    else:
        p = tl.exp2(s - lse)
        return p, p * (dp - total)


@triton.jit
def key_span(dk, dv, k, v, queries, grads, LSE, DELTA, start, stop, blocks, cols, problem, MASKED: tl.constexpr,
             c: tl.constexpr):  # fmt: skip
    """Add to (dk, dv) of one tile of keys what the query blocks number [start, stop) bring."""
    step: tl.constexpr = 1 if c.BLOCK_SPARSE else c.BM
    for i in range(start * step, stop * step, step):
        m0 = first_of(blocks, i, c.BM, c)
        rows = m0 + tl.arange(0, c.BM)
        q = load_rows(queries, m0, problem.Sq, c.BM, c.D, c.BD, 0, MASKED)
        do = load_rows(grads, m0, problem.Sq, c.BM, c.DV, c.BDV, 0, MASKED)
        lse = load_lse(LSE, rows, problem.Sq)
        total = tl.load(DELTA + rows, mask=rows < problem.Sq, other=0.0)
        qi = tl.minimum(rows, problem.Sq - 1)[None, :]
        kj = tl.minimum(cols, problem.Sk - 1)[:, None]
        raw = tl.dot(k, tl.trans(q), input_precision=c.PRECISION) * problem.scale
        s = score_of(raw, qi, kj, problem, c)
        if MASKED:
            seen = seen_of(qi, cols[:, None], kj, problem, c) & (rows < problem.Sq)[None, :]
            s = tl.where(seen, s, float("-inf"))
        dp = tl.dot(v, tl.trans(do), input_precision=c.PRECISION)
        stays = 1.0
        if c.DROPOUT:
            stays = tl.where(keep(problem, qi, kj), problem.keep_scale, 0.0)
        p, ds = gradient_of(s, dp * stays, lse[None, :], total[None, :], c)
        dv = tl.dot((p * stays).to(do.dtype), do, dv, input_precision=c.PRECISION)
        if c.GRAD is not None:
            ds = c.GRAD(raw, ds, problem.b, problem.h, qi, kj, problem.off, p > 0.0, problem.score_args, problem.score_args,
                        False)  # fmt: skip
            if MASKED:
                ds = tl.where(seen, ds, 0.0)
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=c.PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["Sq", "Sk", "w", "seed", "threshold", "tiles"])
def backward_keys(
    q, k, v, do, LSE, DELTA, dk_out, dv_out, ITEMS, CU_Q, CU_K, lists, paging, grad_paging, Hq, Sq, Sk, w, scale, seed,
    threshold, keep_scale, score_args, mask_args, tiles, c: tl.constexpr,
):  # fmt: skip
    """Compute dK and dV of BN keys of one key head: over the query heads of its group, and over the queries that see them.

    Arguments as in `forward`; `lists` has the query blocks of a tile of keys; DELTA and LSE are `[B, Hq, Sq]`; `grad_paging`
    has the pages of dK and dV, which are not the keys' own where requests share those.
    """
    work = take(ITEMS, CU_Q, CU_K, Hq // c.GROUP, Sq, Sk, tiles, False, c)
    BLOCKS, COUNTS, FULL, sbb, sbh, NB = lists
    n0 = work.tile * c.BN
    off = work.Sk - work.Sq
    cols = n0 + tl.arange(0, c.BN)
    keys = load_rows(key_rows(k, paging, work, work.head, c), n0, work.Sk, c.BN, c.D, c.BD, c.PAGE, True)
    values = load_rows(key_rows(v, paging, work, work.head, c), n0, work.Sk, c.BN, c.DV, c.BDV, c.PAGE, True)
    dk = tl.zeros([c.BN, c.BD], tl.float32)
    dv = tl.zeros([c.BN, c.BDV], tl.float32)
    for g in range(c.GROUP):
        h = work.head * c.GROUP + g
        queries = rows_of(q, work.entry, work.q0, h)
        grads = rows_of(do, work.entry, work.q0, h)
        stats = (work.entry * Hq + h) * Sq + work.q0
        lse = LSE + stats
        total = DELTA + stats
        problem = Problem(
            work.request, h, work.request * Hq + h, work.Sq, work.Sk, off, w, scale, seed, threshold, keep_scale, score_args,
            mask_args,
        )  # fmt: skip
        if c.BLOCK_SPARSE:
            row = work.request * sbb + h * sbh + work.tile
            blocks = BLOCKS + row.to(tl.int64) * NB
            full = tl.load(FULL + row)
            count = tl.load(COUNTS + row)
            dk, dv = key_span(dk, dv, keys, values, queries, grads, lse, total, 0, full, blocks, cols, problem,
                              False, c)  # fmt: skip
            dk, dv = key_span(dk, dv, keys, values, queries, grads, lse, total, full, count, blocks, cols,
                              problem, True, c)  # fmt: skip
        else:
            lo, full_lo, full_hi, hi = query_range(n0, c.BN, c.BM, work.Sq, off, w, c.CAUSAL, c.WINDOW)
            if c.MASK is not None:
                full_lo = lo
                full_hi = lo
            if c.CAUSAL or c.WINDOW:
                dk, dv = key_span(dk, dv, keys, values, queries, grads, lse, total, lo, full_lo, n0, cols,
                                  problem, True, c)  # fmt: skip
            if c.MASK is None:
                dk, dv = key_span(dk, dv, keys, values, queries, grads, lse, total, full_lo, full_hi, n0, cols,
                                  problem, False, c)  # fmt: skip
            dk, dv = key_span(dk, dv, keys, values, queries, grads, lse, total, full_hi, hi, n0, cols,
                              problem, True, c)  # fmt: skip
    store_rows(key_rows(dk_out, grad_paging, work, work.head, c), dk * scale, n0, work.Sk, c.BN, c.D, c.BD, c.PAGE)
    store_rows(key_rows(dv_out, grad_paging, work, work.head, c), dv, n0, work.Sk, c.BN, c.DV, c.BDV, c.PAGE)


@triton.jit
def query_span(dq, q, do, lse, total, keys, values, start, stop, blocks, rows, inside, problem, table_grads,
               MASKED: tl.constexpr, c: tl.constexpr):  # fmt: skip
    """Add to dq of one tile of queries what the key blocks number [start, stop) bring."""
    step: tl.constexpr = 1 if c.BLOCK_SPARSE else c.BN
    for i in range(start * step, stop * step, step):
        n0 = first_of(blocks, i, c.BN, c)
        cols = n0 + tl.arange(0, c.BN)
        k = load_rows(keys, n0, problem.Sk, c.BN, c.D, c.BD, c.PAGE, MASKED)
        v = load_rows(values, n0, problem.Sk, c.BN, c.DV, c.BDV, c.PAGE, MASKED)
        qi = rows[:, None]
        kj = tl.minimum(cols, problem.Sk - 1)[None, :]
        raw = tl.dot(q, tl.trans(k), input_precision=c.PRECISION) * problem.scale
        s = score_of(raw, qi, kj, problem, c)
        if MASKED:
            seen = seen_of(qi, cols[None, :], kj, problem, c)
            s = tl.where(seen, s, float("-inf"))
        dp = tl.dot(do, tl.trans(v), input_precision=c.PRECISION)
        if c.DROPOUT:
            dp = tl.where(keep(problem, qi, kj), dp * problem.keep_scale, 0.0)
        _, ds = gradient_of(s, dp, lse[:, None], total[:, None], c)
        if c.GRAD is not None:
            valid = inside & (cols < problem.Sk)[None, :]
            if MASKED:
                valid = valid & seen
            ds = c.GRAD(
                raw, ds, problem.b, problem.h, qi, kj, problem.off, valid, problem.score_args, table_grads, c.TABLES
            )
            if MASKED:
                ds = tl.where(seen, ds, 0.0)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=c.PRECISION)
    return dq


@triton.jit(do_not_specialize=["Sq", "Sk", "w", "seed", "threshold", "tiles", "dq_part"])
def backward_queries(
    q, k, v, do, LSE, DELTA, dq_out, ITEMS, CU_Q, CU_K, lists, paging, dq_part, Hq, Sq, Sk, w, scale, seed, threshold,
    keep_scale, score_args, mask_args, table_grads, tiles, c: tl.constexpr,
):  # fmt: skip
    """Compute dQ of BM queries of one head, and with TABLES the gradients of the score's captured tensors.

    Arguments as in `forward`; of a part of the keys it is a part of dQ, `dq_part` elements after the one before.
    """
    work = take(ITEMS, CU_Q, CU_K, Hq, Sq, Sk, tiles, True, c)
    h = work.head
    stats = (work.entry * Hq + h) * Sq + work.q0
    m0 = work.tile * c.BM
    offsets = m0 + tl.arange(0, c.BM)
    keys = key_rows(k, paging, work, h // c.GROUP, c)
    values = key_rows(v, paging, work, h // c.GROUP, c)
    tile = load_rows(rows_of(q, work.entry, work.q0, h), m0, work.Sq, c.BM, c.D, c.BD, 0, True)
    grad = load_rows(rows_of(do, work.entry, work.q0, h), m0, work.Sq, c.BM, c.DV, c.BDV, 0, True)
    lse = load_lse(LSE + stats, offsets, work.Sq)
    total = tl.load(DELTA + stats + offsets, mask=offsets < work.Sq, other=0.0)
    rows = tl.minimum(offsets, work.Sq - 1)
    inside = (offsets < work.Sq)[:, None]
    problem = Problem(
        work.request, h, work.request * Hq + h, work.Sq, work.Sk, work.Sk - work.Sq, w, scale, seed, threshold, keep_scale,
        score_args, mask_args,
    )  # fmt: skip
    dq = tl.zeros([c.BM, c.BD], tl.float32)
    blocks, lo, full_lo, full_hi, hi = block_spans(work, m0, w, lists, h, c)
    if c.WINDOW and not c.BLOCK_SPARSE:
        dq = query_span(dq, tile, grad, lse, total, keys, values, lo, full_lo, blocks, rows, inside, problem, table_grads,
                        True, c)  # fmt: skip
    if c.BLOCK_SPARSE or c.MASK is None:
        dq = query_span(dq, tile, grad, lse, total, keys, values, full_lo, full_hi, blocks, rows, inside, problem, table_grads,
                        False, c)  # fmt: skip
    dq = query_span(dq, tile, grad, lse, total, keys, values, full_hi, hi, blocks, rows, inside, problem, table_grads, True,
                    c)  # fmt: skip
    store_rows(output_rows(dq_out, work, dq_part, h), dq * scale, m0, work.Sq, c.BM, c.D, c.BD, 0)
