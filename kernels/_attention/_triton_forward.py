# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""The forward template: one body, with the score and the mask as functions that a variant brings."""

from typing import NamedTuple

import triton
import triton.language as tl

from trainkit.kernels._attention._triton_tiles import (
    Problem,
    block_spans,
    first_of,
    keep,
    key_rows,
    load_paged,
    load_rows,
    output_rows,
    pages_at,
    rows_of,
    store_rows,
    take,
    visible,
)

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)


class Softmax(NamedTuple):
    """The online softmax of a tile of queries."""

    acc: tl.tensor
    """Weighted values, under the maximum m."""
    m: tl.tensor
    """Largest score so far, base 2."""
    l: tl.tensor  # noqa: E741 (the field's letter)
    """Row sum of the weights."""


@triton.jit
def fold(state, s, p_scale, value, problem, q, k, c: tl.constexpr):
    """A block's scores and values into the softmax."""
    if c.SIGMOID:
        p = 1.0 / (1.0 + tl.exp2(-s))
        acc = state.acc
        m = state.m
        l = state.l  # noqa: E741
    else:
        m = tl.maximum(state.m, tl.max(s, 1))
        top = tl.where(m == float("-inf"), 0.0, m)
        p = tl.exp2(s - top[:, None])
        alpha = tl.exp2(state.m - top)
        l = state.l * alpha + tl.sum(p, 1)  # noqa: E741
        acc = state.acc * alpha[:, None]
    if c.DROPOUT:
        p = tl.where(keep(problem, q, k), p * p_scale, 0.0)
    return Softmax(tl.dot(p.to(value.dtype), value, acc, input_precision=c.PRECISION), m, l)


@triton.jit
def span(state, q, keys, values, start, stop, blocks, rows, problem, MASKED: tl.constexpr, c: tl.constexpr):
    """Fold the key blocks number [start, stop) into the softmax."""
    step: tl.constexpr = 1 if c.BLOCK_SPARSE else c.BN
    if c.PAGE:
        ahead = pages_at(keys, start * step, problem.Sk, c.BN, c.PAGE)
    for i in range(start * step, stop * step, step):
        n0 = first_of(blocks, i, c.BN, c)
        cols = n0 + tl.arange(0, c.BN)
        # Stored in fewer bits, keys and values are multiplied as queries are.
        if c.PAGE:
            # One block ahead: loads that wait for a load would not be under way while others are multiplied.
            pages = ahead
            ahead = pages_at(keys, n0 + c.BN, problem.Sk, c.BN, c.PAGE)
            k = load_paged(keys, pages, n0, problem.Sk, c.BN, c.D, c.BD, c.PAGE, MASKED).to(q.dtype)
        else:
            k = load_rows(keys, n0, problem.Sk, c.BN, c.D, c.BD, 0, MASKED).to(q.dtype)
        s = tl.dot(q, tl.trans(k), input_precision=c.PRECISION)
        qi = rows[:, None]
        kj = cols[None, :]
        if c.SCORE is not None:
            # Padding rows and keys read no table beyond its end.
            inside = tl.minimum(kj, problem.Sk - 1)
            s = c.SCORE(s * problem.scale, problem.b, problem.h, qi, inside, problem.off, problem.score_args) * LOG2E
        else:
            s = s * (problem.scale * LOG2E)
        if MASKED:
            seen = visible(qi, kj, problem.Sk, problem.off, problem.w, c.CAUSAL, c.WINDOW)
            if c.MASK is not None:
                inside = tl.minimum(kj, problem.Sk - 1)
                seen = seen & c.MASK(problem.b, problem.h, qi, inside, problem.off, problem.mask_args)
            s = tl.where(seen, s, float("-inf"))
        if c.PAGE:
            v = load_paged(values, pages, n0, problem.Sk, c.BN, c.DV, c.BDV, c.PAGE, MASKED).to(q.dtype)
        else:
            v = load_rows(values, n0, problem.Sk, c.BN, c.DV, c.BDV, 0, MASKED).to(q.dtype)
        state = fold(state, s, problem.keep_scale, v, problem, qi, kj, c)
    return state


@triton.jit
def finish(state, SINKS, work, c: tl.constexpr):
    """The epilogue: a tile's output, and lse (natural log), of all its keys or of a part of them.

    A part is an output of its own, with the lse that merges it; the sink counts in the first.
    """
    acc = state.acc
    if c.SIGMOID:
        lse = state.m
    else:
        # Not by the maximum, which passes over NaN: a NaN in the scores must come out.
        empty = state.l == 0.0
        top = tl.where(empty, 0.0, state.m)
        l = state.l  # noqa: E741
        if c.SINK:
            sink = tl.load(SINKS + work.head).to(tl.float32) * LOG2E
            sink = tl.where(work.part == 0, sink, float("-inf"))
            raised = tl.maximum(top, sink)
            alpha = tl.exp2(top - raised)
            acc = acc * alpha[:, None]
            l = l * alpha + tl.exp2(sink - raised)  # noqa: E741
            top = raised
        total = tl.where(empty, 1.0, l)
        acc = tl.where(empty[:, None], 0.0, acc / total[:, None])
        lse = tl.where(empty, float("-inf"), (top + tl.log2(total)) * LN2)
    return acc, lse


@triton.jit(do_not_specialize=["Sq", "Sk", "w", "seed", "threshold", "tiles", "out_part", "lse_part"])
def forward(
    q, k, v, out, LSE, SINKS, ITEMS, CU_Q, CU_K, lists, paging, out_part, lse_part, Hq, Sq, Sk, w, scale, seed, threshold,
    keep_scale, score_args, mask_args, tiles, c: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head.

    Args:
        q: (pointer, strides of batch, tokens and heads), like k, v and out; of pages: `key_rows`.
        LSE: fp32 `[B, Hq, Sq]`; that of part i lies `i * lse_part` elements further, out's `i * out_part`.
        lists: blocks `[B|1, H|1, tiles, NB]` of a tile, the full ones first, how many there are, how many are full, and
            strides of batch, heads and tiles.
    """
    work = take(ITEMS, CU_Q, CU_K, Hq, Sq, Sk, tiles, True, c)
    h = work.head
    m0 = work.tile * c.BM
    offsets = m0 + tl.arange(0, c.BM)
    keys = key_rows(k, paging, work, h // c.GROUP, c)
    values = key_rows(v, paging, work, h // c.GROUP, c)
    tile = load_rows(rows_of(q, work.entry, work.q0, h), m0, work.Sq, c.BM, c.D, c.BD, 0, True)
    rows = tl.minimum(offsets, work.Sq - 1)
    problem = Problem(
        work.request, h, work.request * Hq + h, work.Sq, work.Sk, work.Sk - work.Sq, w, scale, seed, threshold, keep_scale,
        score_args, mask_args,
    )  # fmt: skip
    state = Softmax(
        tl.zeros([c.BM, c.BDV], tl.float32), tl.full([c.BM], float("-inf"), tl.float32), tl.zeros([c.BM], tl.float32)
    )
    blocks, lo, full_lo, full_hi, hi = block_spans(work, m0, w, lists, h, c)
    if c.WINDOW and not c.BLOCK_SPARSE:
        state = span(state, tile, keys, values, lo, full_lo, blocks, rows, problem, True, c)
    if c.BLOCK_SPARSE or c.MASK is None:
        state = span(state, tile, keys, values, full_lo, full_hi, blocks, rows, problem, False, c)
    state = span(state, tile, keys, values, full_hi, hi, blocks, rows, problem, True, c)
    acc, lse = finish(state, SINKS, work, c)
    if not c.SIGMOID:
        at = LSE + (work.part * lse_part + (work.entry * Hq + h) * Sq + work.q0)
        tl.store(at + offsets, lse, mask=offsets < work.Sq)
    store_rows(output_rows(out, work, out_part, h), acc, m0, work.Sq, c.BM, c.DV, c.BDV, 0)
