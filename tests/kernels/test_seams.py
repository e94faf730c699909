"""The seams of the Triton template, used as paged attention will use them: keys in pages, and work that is a part of the keys."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

import itertools

from kernels_interpreter import interpreter

from trainkit.kernels._attention import _triton, _triton_backward, _triton_forward
from trainkit.kernels._attention._call import Call, Tiling
from trainkit.kernels._attention._delta import row_delta
from trainkit.kernels._attention._reference import reference
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._variant import build

PAGE, HQ, HKV, D = 8, 4, 2, 16
LENGTHS = [(5, 37), (40, 40), (1, 70)]
"""Queries and keys of each request."""


@pytest.fixture(autouse=True)
def interpreted():
    if torch.cuda.is_available():
        pytest.skip("on Triton's interpreter")
    with interpreter():
        yield


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def paged(rows, cu):
    """Rows `[tokens, H, D]` in pages `[pages, PAGE, H, D]` of any order, and the pages of each request."""
    counts = [-(-int(b - a) // PAGE) for a, b in itertools.pairwise(cu)]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(0))[: sum(counts)].int()
    indptr = cumulative(counts)
    pages = torch.full((sum(counts) + 3, PAGE, *rows.shape[1:]), float("nan"))
    for r in range(len(counts)):
        for i, row in enumerate(rows[cu[r] : cu[r + 1]]):
            pages[order[indptr[r] + i // PAGE], i % PAGE] = row
    return pages, (indptr, order)


def unpaged(pages, paging, cu):
    indptr, order = paging
    return torch.cat([
        pages[order[indptr[r] : indptr[r + 1]].long()].flatten(0, 1)[: cu[r + 1] - cu[r]] for r in range(len(cu) - 1)
    ])  # fmt: skip


@pytest.mark.parametrize("parts", [1, 3])
def test_keys_in_pages_and_results_in_parts(parts):
    """Each tile's keys are cut among `parts` programs; what they give is merged here, and equals the reference."""
    g = torch.Generator().manual_seed(0)
    cu_q, cu_k = cumulative([n for n, _ in LENGTHS]), cumulative([m for _, m in LENGTHS])
    q, k, v = (torch.randn(int(n[-1]), h, D, generator=g) for n, h in ((cu_q, HQ), (cu_k, HKV), (cu_k, HKV)))
    spec, tiling = Spec(scale=0.3, causal=True), Tiling(32, 32, 4, 1)
    call = Call(spec, None, build(spec, torch.device("cpu")))
    leaves = [x[None].clone().requires_grad_() for x in (q, k, v)]
    wants = [
        reference(*(x[:, c[r] : c[r + 1]] for x, c in zip(leaves, (cu_q, cu_k, cu_k), strict=True)), spec)
        for r in range(len(LENGTHS))
    ]
    want, want_lse = torch.cat([o for o, _ in wants], 1)[0], torch.cat([lse for _, lse in wants], 2)[0]
    grad = torch.randn(want.shape, generator=g)
    want_grads = torch.autograd.grad(want, leaves, grad)

    keys, paging = paged(k, cu_k)
    values, _ = paged(v, cu_k)
    work = []
    for r, (n, m) in enumerate(LENGTHS):
        step = 32 * -(-m // (32 * parts))
        work += [(r, t, p * step, (p + 1) * step, p) for t in range(-(-n // 32)) for p in range(parts)]
    items = torch.tensor(work, dtype=torch.int32)
    tokens = q.shape[0]
    out = torch.zeros(parts, tokens, HQ, D)
    lse = torch.full((parts, HQ, tokens), -torch.inf)

    def rows(x):
        return x, 0, x.stride(-3), x.stride(-2)

    def pages(x):
        return x, x.stride(0), x.stride(1), x.stride(2)

    def constants(**more):
        made = _triton._constants(call, q[None], k[None], v[None], tiling, False, **more)
        return type(made)(**{**dict(made._known), "PAGE": PAGE, "LISTED_WORK": True})

    numbers = _triton._scalars(call, q[None], k[None])
    nothing = (None, None, None, 0, 0, 0)
    _triton.launch(
        _triton_forward.forward, (len(work), HQ, 1), tiling, rows(q), pages(keys), pages(values), rows(out), lse, None, items,
        cu_q, cu_k, nothing, paging, out.stride(0), lse.stride(0), *numbers, constants(SINK=False),
    )  # fmt: skip
    total = torch.logsumexp(lse, 0)
    merged = (out * torch.exp(lse - total).transpose(1, 2)[..., None]).sum(0)
    torch.testing.assert_close(total, want_lse, atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(merged, want, atol=2e-6, rtol=1e-5)

    delta = row_delta(merged[None], grad[None], None)[0].contiguous()
    dq = torch.zeros(parts, tokens, HQ, D)
    inputs = (rows(q), pages(keys), pages(values), rows(grad), total.contiguous(), delta)
    _triton.launch(
        _triton_backward.backward_queries, (len(work), HQ, 1), tiling, *inputs, rows(dq), items, cu_q, cu_k, nothing, paging,
        dq.stride(0), *numbers, (), constants(TABLES=False),
    )  # fmt: skip
    torch.testing.assert_close(dq.sum(0), want_grads[0][0], atol=5e-6, rtol=1e-5)
    if parts == 1:
        tiles = [(r, t, 0, 0, 0) for r, (_, m) in enumerate(LENGTHS) for t in range(-(-m // 32))]
        dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
        _triton.launch(
            _triton_backward.backward_keys, (len(tiles), HKV, 1), tiling, *inputs, pages(dk), pages(dv),
            torch.tensor(tiles, dtype=torch.int32), cu_q, cu_k, nothing, paging, paging, *numbers, constants(),
        )  # fmt: skip
        for got, exact in ((dk, want_grads[1]), (dv, want_grads[2])):
            torch.testing.assert_close(unpaged(got, paging, cu_k), exact[0], atol=5e-6, rtol=1e-5)
