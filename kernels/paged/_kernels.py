# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Attention over pages, as a plan says: decoding, chunks of prompts and shared prefixes in one launch.

A kernel of its own beside the template, whose parts it is made of: a tile's rows are tokens times the query heads of one key
head (decoding has too few tokens to fill a tile otherwise), programs stay and take their pieces from a plan, and whoever ends
the last part of a token's result merges them, in the plan's order.
"""

import triton
import triton.language as tl

from trainkit.kernels._attention._triton_forward import LN2, LOG2E, Softmax, finish, span
from trainkit.kernels._attention._triton_tiles import Problem, Rows, Work
from trainkit.kernels.paged._plan_reference import PIECE as _PIECE

PIECE: tl.constexpr = tl.constexpr(_PIECE)


@triton.jit
def merge_parts(out, LSE, SINKS, PARTS, PART_LSE, MERGE_ROWS, start, stop, token, head, Hq, v_scale, c: tl.constexpr):
    """The result of one token and key head, of its parts number [start, stop), many at a time: few rows have many parts."""
    g = tl.arange(0, c.BG)
    d = tl.arange(0, c.BDV)
    m = tl.full([c.BG], float("-inf"), tl.float32)
    l = tl.zeros([c.BG], tl.float32)  # noqa: E741
    acc = tl.zeros([c.BG, c.BDV], tl.float32)
    heads = head * c.GROUP + g
    for i in range(start, stop, c.PB):
        at = i + tl.arange(0, c.PB)
        row = tl.load(MERGE_ROWS + at, mask=at < stop, other=0)[:, None] + g[None, :]
        there = (at < stop)[:, None] & (g < c.GROUP)[None, :]
        # Written by other programs of this launch: not from this processor's own cache.
        s = tl.load(PART_LSE + row, mask=there, other=float("-inf"), cache_modifier=".cg") * LOG2E
        raised = tl.maximum(m, tl.max(s, 0))
        top = tl.where(raised == float("-inf"), 0.0, raised)
        weight = tl.exp2(s - top[None, :])
        fade = tl.exp2(m - top)
        cells = row.to(tl.int64)[:, :, None] * c.DV + d[None, None, :]
        o = tl.load(PARTS + cells, mask=there[:, :, None] & (d < c.DV)[None, None, :], other=0.0, cache_modifier=".cg")
        acc = acc * fade[:, None] + tl.sum(o * weight[:, :, None], 0)
        l = l * fade + tl.sum(weight, 0)  # noqa: E741
        m = raised
    empty = l == 0.0
    top = tl.where(empty, 0.0, m)
    if c.SINK:
        sink = tl.load(SINKS + heads, mask=g < c.GROUP, other=float("-inf")).to(tl.float32) * LOG2E
        raised = tl.maximum(top, sink)
        acc = acc * tl.exp2(top - raised)[:, None]
        l = l * tl.exp2(top - raised) + tl.exp2(sink - raised)  # noqa: E741
        top = raised
    whole = tl.where(empty, 1.0, l)
    acc = tl.where(empty[:, None], 0.0, acc / whole[:, None] * v_scale)
    X, st, sh = out
    at = X + token.to(tl.int64) * st + heads[:, None] * sh + d[None, :]
    tl.store(at, acc.to(X.dtype.element_ty), mask=(g < c.GROUP)[:, None] & (d < c.DV)[None, :])
    lse = tl.where(empty, float("-inf"), (top + tl.log2(whole)) * LN2)
    tl.store(LSE + token.to(tl.int64) * Hq + heads, lse, mask=g < c.GROUP)


@triton.jit
def merge_tile(out, LSE, SINKS, PARTS, PART_LSE, MERGE_ROWS, begin, end, token, heads, g, Hq, v_scale, c: tl.constexpr):
    """The results of a tile's rows at once, each of its parts number [begin, end); none where there are none."""
    d = tl.arange(0, c.BDV)
    m = tl.full([c.BM], float("-inf"), tl.float32)
    l = tl.zeros([c.BM], tl.float32)  # noqa: E741
    acc = tl.zeros([c.BM, c.BDV], tl.float32)
    ahead = tl.load(MERGE_ROWS + begin, mask=begin < end, other=0)
    for i in range(0, tl.max(end - begin, 0)):
        row = (ahead + g).to(tl.int64)
        there = begin + i < end
        ahead = tl.load(MERGE_ROWS + begin + i + 1, mask=begin + i + 1 < end, other=0)
        s = tl.load(PART_LSE + row, mask=there, other=float("-inf"), cache_modifier=".cg") * LOG2E
        at = row[:, None] * c.DV + d[None, :]
        o = tl.load(PARTS + at, mask=there[:, None] & (d < c.DV)[None, :], other=0.0, cache_modifier=".cg")
        raised = tl.maximum(m, s)
        top = tl.where(raised == float("-inf"), 0.0, raised)
        weight = tl.exp2(s - top)
        fade = tl.exp2(m - top)
        acc = acc * fade[:, None] + o * weight[:, None]
        l = l * fade + weight  # noqa: E741
        m = raised
    zero = tl.zeros([], tl.int64)
    work = Work(zero, zero, heads, zero, zero, zero, zero, zero, zero, zero, zero)
    acc, lse = finish(Softmax(acc, m, l), SINKS, work, c)
    X, st, sh = out
    at = X + token.to(tl.int64)[:, None] * st + heads[:, None] * sh + d[None, :]
    tl.store(at, (acc * v_scale).to(X.dtype.element_ty), mask=(begin < end)[:, None] & (d < c.DV)[None, :])
    tl.store(LSE + token.to(tl.int64) * Hq + heads, lse, mask=begin < end)


@triton.jit
def attend(i, q, k, v, out, LSE, SINKS, PIECES, TOKENS, PAGES, PARTS, PART_LSE, MERGE, MERGE_ROWS, COUNTS, K_SCALE, V_SCALE,
           Hq, w, scale, score_args, c: tl.constexpr):  # fmt: skip
    """Piece number i."""
    PIECES += i * PIECE
    first = tl.load(PIECES)
    count = tl.load(PIECES + 1)
    pages = PAGES + tl.load(PIECES + 2)
    keys = tl.load(PIECES + 3)
    head = tl.load(PIECES + 4)
    lo = tl.load(PIECES + 5)
    full_lo = tl.load(PIECES + 6)
    full_hi = tl.load(PIECES + 7)
    hi = tl.load(PIECES + 8)
    part = tl.load(PIECES + 9)

    r = tl.arange(0, c.BM)
    there = r < count * c.GROUP
    token = first + tl.minimum(r // c.GROUP, count - 1)
    heads = head * c.GROUP + r % c.GROUP
    Q, st, sh = q
    cols = tl.arange(0, c.BD)
    at = Q + token.to(tl.int64)[:, None] * st + heads[:, None] * sh + cols[None, :]
    tile = tl.load(at, mask=there[:, None] & (cols < c.D)[None, :], other=0.0)
    request = tl.load(TOKENS + token * 3)
    index = tl.load(TOKENS + token * 3 + 1)
    off = tl.load(TOKENS + token * 3 + 2)
    K, kb, ks, kh = k
    V, vb, vs, vh = v
    k_rows = Rows(K + head.to(tl.int64) * kh, ks, pages, kb)
    v_rows = Rows(V + head.to(tl.int64) * vh, vs, pages, vb)
    v_scale = 1.0
    if c.SCALED:
        scale = scale * tl.load(K_SCALE + head)
        v_scale = tl.load(V_SCALE + head)
    zero = tl.zeros([], tl.int64)
    problem = Problem(
        request[:, None], heads[:, None], zero, zero, keys, off[:, None], w, scale, zero, zero, 1.0, score_args, ()
    )
    state = Softmax(
        tl.zeros([c.BM, c.BDV], tl.float32), tl.full([c.BM], float("-inf"), tl.float32), tl.zeros([c.BM], tl.float32)
    )
    if c.SMALL:
        # Reading keys is what takes the time; a mask on all of them costs less than more code does.
        state = span(state, tile, k_rows, v_rows, lo, hi, lo, index, problem, True, c)
    else:
        if c.WINDOW:
            state = span(state, tile, k_rows, v_rows, lo, full_lo, lo, index, problem, True, c)
        state = span(state, tile, k_rows, v_rows, full_lo, full_hi, lo, index, problem, False, c)
        state = span(state, tile, k_rows, v_rows, full_hi, hi, lo, index, problem, True, c)
    # The sink counts where a row's result becomes whole: here, or as its parts are merged.
    acc, lse = finish(state, SINKS, Work(zero, zero, heads, zero, zero, zero, zero, zero, zero, zero, part + 1), c)
    columns = tl.arange(0, c.BDV)
    kept = there[:, None] & (columns < c.DV)[None, :]
    if part < 0:
        O, ot, oh = out
        at = O + token.to(tl.int64)[:, None] * ot + heads[:, None] * oh + columns[None, :]
        tl.store(at, (acc * v_scale).to(O.dtype.element_ty), mask=kept)
        tl.store(LSE + token.to(tl.int64) * Hq + heads, lse, mask=there)
    else:
        row = (part + r).to(tl.int64)
        tl.store(PARTS + row[:, None] * c.DV + columns[None, :], acc, mask=kept)
        tl.store(PART_LSE + row, lse, mask=there)
        # All of this program's parts, then the count that says so.
        tl.debug_barrier()
        each = tl.arange(0, c.BT)
        slots = (first + each) * c.KV_HEADS + head
        live = each < count
        told = tl.atomic_add(COUNTS + slots, 1, mask=live, sem="acq_rel")
        begin = tl.load(MERGE + slots, mask=live, other=0)
        end = tl.load(MERGE + slots + 1, mask=live, other=0)
        last = live & (told == end - begin - 1)
        tl.store(COUNTS + slots, each * 0, mask=last)
        tl.debug_barrier()
        if not c.SMALL:
            mine = r // c.GROUP
            shown = (mine[:, None] == each[None, :]) & last[None, :]
            starts = tl.sum(tl.where(shown, begin[None, :], 0), 1)
            ends = tl.sum(tl.where(shown, end[None, :], 0), 1)
            ends = tl.where(there, ends, starts)
            merge_tile(
                out, LSE, SINKS, PARTS, PART_LSE, MERGE_ROWS, starts, ends, token, heads, r % c.GROUP, Hq, v_scale, c
            )
        elif tl.max(last.to(tl.int32), 0) > 0:
            for t in range(0, count):
                this = each == t
                if tl.max((this & last).to(tl.int32), 0) > 0:
                    merge_parts(
                        out, LSE, SINKS, PARTS, PART_LSE, MERGE_ROWS, tl.sum(tl.where(this, begin, 0), 0),
                        tl.sum(tl.where(this, end, 0), 0), first + t, head, Hq, v_scale, c,
                    )  # fmt: skip


@triton.jit(do_not_specialize=["Hq", "w"])
def paged(
    q, k, v, out, LSE, SINKS, WORKERS, PIECES, TOKENS, PAGES, PARTS, PART_LSE, MERGE, MERGE_ROWS, COUNTS, K_SCALE, V_SCALE,
    Hq, w, scale, score_args, c: tl.constexpr,
):  # fmt: skip
    """One program's pieces.

    Args:
        q: (pointer, strides of tokens and heads), like out.
        k: (pointer, strides of pages, tokens and heads), like v.
        LSE: fp32 `[tokens, Hq]`, natural log.
        WORKERS: what `_plan_reference.Plan` names worker_indptr; PIECES, TOKENS, MERGE and MERGE_ROWS likewise, and PAGES
            is kv_indices.
        PARTS: fp32 `[rows, Dv]`, and PART_LSE `[rows]`.
        COUNTS: int32 `[tokens * kv heads]`, 0 before and after.
    """
    worker = tl.program_id(0)
    for i in range(tl.load(WORKERS + worker), tl.load(WORKERS + worker + 1)):
        attend(
            i, q, k, v, out, LSE, SINKS, PIECES, TOKENS, PAGES, PARTS, PART_LSE, MERGE, MERGE_ROWS, COUNTS, K_SCALE, V_SCALE,
            Hq, w, scale, score_args, c,
        )  # fmt: skip
