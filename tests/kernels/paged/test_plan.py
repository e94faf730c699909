"""Plans: every head meets every key that it sees exactly once, shares are equal, bad tables are refused, planners agree."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from paged_cases import batch, numpy_tables

from trainkit.kernels import Maximum, PagedAttention
from trainkit.kernels.paged import _plan_reference, _planner
from trainkit.kernels.paged._plan_reference import START, Shape
from trainkit.kernels.paged._tables import Tables, check

needs_native = pytest.mark.skipif(_planner._native is None, reason="the native core is not built")


@st.composite
def batches(draw):
    B = draw(st.integers(0, 7))
    page_size = draw(st.sampled_from([1, 4, 16]))
    queries = draw(st.lists(st.integers(0, draw(st.sampled_from([1, 3, 30]))), min_size=B, max_size=B))
    keys = draw(st.lists(st.integers(0, 150), min_size=B, max_size=B))
    prefix = draw(st.integers(0, min((n // page_size for n in keys), default=0)))
    made = batch(queries, keys, page_size, prefix=prefix, seed=draw(st.integers(0, 99)))
    shape = Shape(
        page_size, made.pages, draw(st.sampled_from([1, 4, 7])), draw(st.sampled_from([1, 2])), draw(st.booleans()),
        draw(st.sampled_from([0, 0, 20])), draw(st.sampled_from([16, 64])), draw(st.sampled_from([8, 16])),
        draw(st.sampled_from([1, 5, 40])), draw(st.booleans()),
    )  # fmt: skip
    return Tables(*numpy_tables(made)), shape


def seen_by(tables, shape):
    """What each (token, key head) must see: keys of the cache, as (page, place), one after the other."""
    lengths = tables.lengths(shape.page_size)
    for b, n in enumerate(lengths):
        count = tables.qo_indptr[b + 1] - tables.qo_indptr[b]
        pages = tables.kv_indices[tables.kv_indptr[b] : tables.kv_indptr[b + 1]]
        for i in range(count):
            p = i + n - count
            j = np.arange(n)
            kept = np.ones(n, bool)
            if shape.causal:
                kept &= j <= p
            if shape.window:
                kept &= abs(p - j) < shape.window
            yield (
                tables.qo_indptr[b] + i,
                p,
                [(int(pages[x // shape.page_size]), int(x % shape.page_size)) for x in j[kept]],
            )


def met_by(tables, shape, plan):
    """What each (token, key head) meets in the pieces, by the kernel's rules, and whether blocks said to be full are."""
    lengths = tables.lengths(shape.page_size)
    met: dict = {}
    for first, count, page, keys, head, lo, full_lo, full_hi, hi, *_ in plan.pieces.tolist():
        assert 0 <= lo <= full_lo <= full_hi <= hi
        for t in range(first, first + count):
            b, i, off = plan.tokens[t]
            assert lengths[b] >= min(keys, hi * shape.bn)
            for n in range(lo * shape.bn, hi * shape.bn):
                gap = i + off - n
                visible = n < keys and (not shape.causal or gap >= 0) and (not shape.window or abs(gap) < shape.window)
                if full_lo * shape.bn <= n < full_hi * shape.bn:
                    assert visible
                if visible:
                    at = int(tables.kv_indices[page + n // shape.page_size]), n % shape.page_size
                    met.setdefault((t, head), []).append(at)
    return met


@given(batches())
@settings(max_examples=40, deadline=None)
def test_every_key_is_met_exactly_once(case):
    tables, shape = case
    plan = _plan_reference.plan(tables, shape)
    met = met_by(tables, shape, plan)
    for token, _, keys in seen_by(tables, shape):
        for head in range(shape.kv_heads):
            assert sorted(met.pop((token, head), [])) == sorted(keys)
    assert not met
    # Every part has a place of its own, and is merged once.
    used = [r for *_, row, _, _ in plan.pieces.tolist() for r in [row] if r >= 0]
    assert len(used) == len(set(used)) and plan.worker_indptr[-1] == len(plan.pieces)
    merged = sorted(plan.merge_rows.tolist())
    expected = sorted(
        p[9] + i * shape.group for p in plan.pieces.tolist() if p[9] >= 0 for i in range(p[1])
    )  # fmt: skip
    assert merged == expected


@needs_native
@given(batches())
@settings(max_examples=60, deadline=None)
def test_the_native_planner_makes_the_same_plan(case):
    tables, shape = case
    want = _plan_reference.plan(tables, shape)
    native = _planner._native.Planner()
    *sizes, rows = native.plan(*tables, *shape)
    at = np.cumsum([0, *sizes])
    buffer = np.zeros(at[-1], np.int32)
    native.write(buffer, *map(int, at[:5]))
    for i, x in enumerate(want[:5]):
        assert buffer[at[i] : at[i + 1]].tolist() == x.ravel().tolist()
    assert rows == want.rows


@pytest.mark.parametrize("lengths", [[8192] * 64, [131072] + [512] * 63, list(range(100, 6500, 100))])
def test_shares_are_equal(lengths):
    made = batch([1] * len(lengths), lengths, 16)
    shape = Shape(16, made.pages, 4, 8, True, 0, 16, 64, 264, True)
    plan = _plan_reference.plan(Tables(*numpy_tables(made)), shape)
    cost = (plan.pieces[:, 8] - plan.pieces[:, 5] + START).astype(float)
    shares = np.add.reduceat(np.append(cost, 0), plan.worker_indptr[:-1])
    assert shares.max() <= 1.1 * shares.mean()


GOOD = ([0, 1, 3], [0, 2, 3], [4, 0, 2], [3, 8])
BAD = {
    "qo_indptr must not fall": ([0, 3, 1], *GOOD[1:]),
    "qo_indptr must begin with 0": ([1, 1, 3], *GOOD[1:]),
    "kv_indptr must not fall": (GOOD[0], [0, 4, 3], *GOOD[2:]),
    "kv_indptr must end at the 3 numbers": (GOOD[0], [0, 2, 4], *GOOD[2:]),
    r"got 5 at 1 \(request 0\)": (*GOOD[:2], [4, 5, 2], GOOD[3]),
    r"got -1 at 2 \(request 1\)": (*GOOD[:2], [4, 0, -1], GOOD[3]),
    "got 0 at request 1": (*GOOD[:3], [3, 0]),
    "got 9 at request 0": (*GOOD[:3], [9, 8]),
    "one number more than there are requests": (*GOOD[:3], [3]),
}


@pytest.mark.parametrize("rule", BAD)
def test_corrupt_tables_are_refused(rule):
    tables = Tables(*(np.array(x, np.int32) for x in BAD[rule]))
    with pytest.raises(ValueError, match=rule):
        check(tables, 8, 5)
    if _planner._native is not None:
        with pytest.raises(ValueError, match=rule):
            _planner._native.Planner().plan(*tables, *Shape(8, 5, 1, 1, True, 0, 16, 16, 4, True))
    with pytest.raises(ValueError, match=rule):
        PagedAttention().plan(
            *map(torch.from_numpy, tables), num_qo_heads=1, num_kv_heads=1, head_dim=16, page_size=8, num_pages=5,
            dtype=torch.float32, device="cpu",
        )  # fmt: skip


def test_other_refusals():
    tables = [torch.tensor(x, dtype=torch.int32) for x in GOOD]
    good = {
        "num_qo_heads": 4, "num_kv_heads": 2, "head_dim": 16, "page_size": 8, "num_pages": 5, "dtype": torch.float32,
        "device": "cpu",
    }  # fmt: skip
    paged = PagedAttention()
    with pytest.raises(RuntimeError, match="nothing is planned"):
        paged.run(torch.zeros(3, 4, 16), torch.zeros(5, 2, 8, 2, 16))
    for change, rule in (
        ({"page_size": 129}, "1 to 128"), ({"num_qo_heads": 3}, "multiple"), ({"dtype": torch.int8}, "bf16"),
        ({"kv_dtype": torch.float16}, "kv_dtype"), ({"head_dim": 300}, "head_dim"),
        ({"cuda_graph_max": Maximum(1, 9, 9)}, "holds 1 requests, got 2"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=rule):
            paged.plan(*tables, **(good | change))
    with pytest.raises(ValueError, match="int32"):
        paged.plan(tables[0].long(), *tables[1:], **good)
    paged.plan(*tables, **good)
    cache = torch.zeros(5, 2, 8, 2, 16)
    for q, kv, more, rule in (
        (torch.zeros(2, 4, 16), cache, {}, r"q must be \[3, 4, 16\]"),
        (torch.zeros(3, 4, 16), cache[:4], {}, "as planned"),
        (torch.zeros(3, 4, 16), (cache[:, 0], torch.zeros(5, 8, 2, 32)), {}, "values must be"),
        (torch.zeros(3, 4, 16), cache.double(), {}, "as planned"),
        (torch.zeros(3, 4, 16), cache, {"sinks": torch.zeros(4)}, "sinks=False"),
        (torch.zeros(3, 4, 16), cache, {"k_scale": torch.ones(2)}, "come together"),
    ):
        with pytest.raises(ValueError, match=rule):
            paged.run(q, kv, **more)
