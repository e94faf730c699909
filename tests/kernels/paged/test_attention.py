"""Paged attention on Triton's interpreter, and what surrounds it, against pages gathered and attended to plainly."""

import pytest
import torch
from paged_cases import batch, planned, tensors

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

from kernels_interpreter import interpreter

from trainkit.kernels import PagedAttention, append_kv, attention, merge_states
from trainkit.kernels.paged import _merge


@pytest.fixture(autouse=True)
def interpreted():
    if torch.cuda.is_available():
        pytest.skip("on Triton's interpreter")
    with interpreter():
        yield


def both(made, Hq, Hkv, D, *, layout="NHD", share=True, tensors_by_name=None, **options):
    """Results and gradients of the kernels and of the reference."""
    q, cache = tensors(made, Hq, Hkv, D, layout=layout)
    more = tensors_by_name or {}
    options |= {"alibi": "alibi_slopes" in more, "sinks": "sinks" in more}
    results = []
    for backend in ("triton", "reference"):
        paged = planned(PagedAttention(backend=backend, layout=layout, **options), made, q, cache, share=share)
        leaves = [q.clone().requires_grad_(), cache.clone().requires_grad_()]
        named = dict(more)
        if "sinks" in more:
            named["sinks"] = more["sinks"].clone().requires_grad_()
            leaves.append(named["sinks"])
        out, lse = paged.run(*leaves[:2], **named)
        g = torch.Generator().manual_seed(1)
        loss = (out * torch.randn(out.shape, generator=g)).sum()
        loss = loss + (torch.where(lse.isfinite(), lse, 0) * torch.randn(lse.shape, generator=g)).sum()
        results.append((out, lse, *torch.autograd.grad(loss, leaves)))
    return results


CASES = {
    "decoding, an empty request, the last page full": ((1, 1, 0, 1, 1), (37, 70, 5, 0, 16), 8, {}),
    "one key": ((1,), (1,), 16, {}),
    "long, cut among programs": ((1, 1), (200, 90), 16, {}),
    "prompts in chunks beside decoding": ((5, 33, 1), (37, 33, 70), 8, {}),
    "window": ((5, 20, 1), (37, 40, 70), 8, {"window": 9}),
    "pages of one": ((1, 3, 1), (37, 40, 20), 1, {"softcap": 4.0}),
    "every key seen": ((1, 3, 1), (37, 40, 20), 4, {"causal": False}),
    "more queries than keys": ((6,), (3,), 4, {}),
}


@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name):
    queries, keys, page, options = CASES[name]
    heads = {"pages of one": (16, 1), "long, cut among programs": (3, 1)}.get(name, (4, 2))
    for ours, exact in zip(*both(batch(queries, keys, page), *heads, 16, **options), strict=True):
        torch.testing.assert_close(ours, exact, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("layout", ["NHD", "HND"])
def test_variants_and_layouts(layout):
    made = batch((1, 3, 1), (37, 40, 30), 8)
    table = torch.randn(4)
    named = {"sinks": torch.randn(4), "alibi_slopes": torch.rand(4)}
    mod = lambda s, b, h, i, j: s + table[h] * 0.1 - (i - j) * 0.01 + b * 0.2  # noqa: E731
    for ours, exact in zip(*both(made, 4, 2, 16, layout=layout, score_mod=mod, tensors_by_name=named), strict=True):
        torch.testing.assert_close(ours, exact, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("share", [True, False])
def test_shared_prefixes(share):
    """Read once or not, the results are the same, sinks counted once; gradients of a shared page are of all who read it."""
    made = batch((1, 1, 2, 1), (100, 70, 90, 64), 4, prefix=16)
    named = {"sinks": torch.randn(4)}
    results = both(made, 4, 1, 16, share=share, tensors_by_name=named)
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=3e-5, rtol=1e-4)
    q, cache = tensors(made, 4, 1, 16)
    pieces = planned(PagedAttention(), made, q, cache, share=share)._planner.arrays.pieces.reshape(-1, 12)
    assert (pieces[:, 1] > 2).any() == share


def test_the_reference_is_attention():
    made = batch((7,), (20,), 8)
    q, cache = tensors(made, 4, 2, 16, dtype=torch.float64)
    out, lse = planned(PagedAttention(), made, q, cache).run(q, cache)
    keys, values = (cache[made.tables[2].long(), i].flatten(0, 1)[None, :20] for i in (0, 1))
    want, want_lse = attention(q[None], keys, values, causal=True, return_lse=True, backend="reference")
    torch.testing.assert_close(out, want[0])
    torch.testing.assert_close(lse, want_lse[0].T)


def test_fp8_with_a_scale_a_head_and_appending():
    """What is appended is what is attended to, within fp8's three bits of mantissa."""
    made = batch((5, 1), (37, 16), 8)
    g = torch.Generator().manual_seed(3)
    k, v = (torch.randn(6, 2, 16, generator=g) * 3 for _ in range(2))
    q = torch.randn(6, 4, 16, generator=g)
    cache = torch.zeros(made.pages, 2, 8, 2, 16).to(torch.float8_e4m3fn)
    plain = torch.zeros(made.pages, 2, 8, 2, 16)
    k_scale, v_scale = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 0.25])
    append_kv(k, v, cache, *made.tables, k_scale=k_scale, v_scale=v_scale)
    append_kv(k, v, plain, *made.tables)
    found = []
    for x, more in ((cache, {"k_scale": k_scale, "v_scale": v_scale}), (plain, {})):
        for backend in ("triton", "reference"):
            paged = planned(PagedAttention(backend=backend), made, q, plain, kv_dtype=x.dtype)
            found.append(paged.run(q, x, **more)[0])
    torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found[0], found[3], atol=0.4, rtol=0.1)
    assert plain.count_nonzero() == 2 * 6 * 2 * 16
    with pytest.raises(ValueError, match="gradients need a cache"):
        planned(PagedAttention(), made, q, plain, kv_dtype=cache.dtype).run(
            q.requires_grad_(), cache, k_scale=k_scale, v_scale=v_scale
        )


def test_appends_that_cannot_be():
    made = batch((3, 2), (2, 9), 4)
    k = torch.zeros(5, 1, 8)
    cache = torch.zeros(made.pages, 2, 4, 1, 8)
    with pytest.raises(ValueError, match="request 0 appends 3 tokens, but its pages hold 2 keys"):
        append_kv(k, k, cache, *made.tables)
    made = batch((2, 3), (8, 8), 4)
    made.tables[2][3] = made.tables[2][1]
    cache = torch.zeros(made.pages, 2, 4, 1, 8)
    with pytest.raises(ValueError, match=f"page {int(made.tables[2][1])} is written by requests 0 and 1"):
        append_kv(k, k, cache, *made.tables)


def test_merging_states():
    g = torch.Generator().manual_seed(0)
    out, lse = torch.randn(3, 21, 2, 16, generator=g), torch.randn(3, 21, 2, generator=g)
    lse[0, :5] = lse[:, 3] = -torch.inf
    results = []
    for merge in (merge_states, _merge.reference):
        leaves = [out.clone().requires_grad_(), lse.clone().requires_grad_()]
        merged, total = merge(*leaves)
        loss = (merged**2).sum() + torch.where(total.isfinite(), total, 0.0).sum()
        results.append((merged, total, *(torch.nan_to_num(x) for x in torch.autograd.grad(loss, leaves))))
    for ours, exact in zip(*results, strict=True):
        torch.testing.assert_close(ours, exact, atol=1e-5, rtol=1e-4)
    assert torch.equal(merge_states(out, lse)[0][3], torch.zeros(2, 16))
    # In any order and grouping the same; and as attention over all keys at once.
    first = merge_states(out[:2], lse[:2])
    grouped = merge_states(torch.stack([out[2], first[0]]), torch.stack([lse[2], first[1]]))
    torch.testing.assert_close(grouped[0], merge_states(out, lse)[0], atol=1e-6, rtol=1e-5)
    q, k, v = (torch.randn(1, n, 2, 16, generator=g) for n in (4, 30, 30))
    parts = [
        attention(q, k[:, a:b], v[:, a:b], return_lse=True, backend="reference") for a, b in ((0, 7), (7, 19), (19, 30))
    ]
    merged, _ = merge_states(torch.stack([o[0] for o, _ in parts]), torch.stack([s[0].T for _, s in parts]))
    torch.testing.assert_close(merged, attention(q, k, v, backend="reference")[0], atol=1e-6, rtol=1e-5)
    with pytest.raises(ValueError, match=r"\[S, N, H, D\]"):
        merge_states(out, lse[:, :20])
