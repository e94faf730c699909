"""The seams of the Hopper template, on the CPU: keys in pages, and work that is a part of the keys; as `test_seams.py`."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

import kernels_gluon
from kernels_interpreter import interpreter

from trainkit.kernels._attention import _hopper_backward_keys, _hopper_backward_queries, _hopper_forward
from trainkit.kernels._attention._reference import reference
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._views import MatrixView, dense_view
from trainkit.kernels._launch import Launch, Template

PAGE, HQ, HKV, D = 16, 4, 2, 64
LENGTHS = [(5, 37), (140, 140), (1, 270)]
"""Queries and keys of each request."""
SCALE = 0.3


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).int()


def paged(rows, cu):
    """Rows `[tokens, H, D]` in pages `[pages, PAGE, H, D]` of any order, what is unused NaN; and each request's pages."""
    counts = [-(-int(b - a) // PAGE) for a, b in itertools.pairwise(cu)]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(0))[: sum(counts)].int()
    indptr = cumulative(counts)
    pages = torch.full((sum(counts) + 3, PAGE, *rows.shape[1:]), float("nan"), dtype=rows.dtype)
    for r in range(len(counts)):
        for i, row in enumerate(rows[cu[r] : cu[r + 1]]):
            pages[order[indptr[r] + i // PAGE], i % PAGE] = row
    return pages, indptr, order


def unpaged(pages, indptr, order, cu):
    return torch.cat([
        pages[order[indptr[r] : indptr[r + 1]].long()].flatten(0, 1)[: cu[r + 1] - cu[r]] for r in range(len(cu) - 1)
    ])  # fmt: skip


def items(parts, size, block, by_keys=False):
    """Work on tiles of `size`, each tile's keys cut into parts of whole blocks."""
    work = []
    for r, (n, m) in enumerate(LENGTHS):
        step = block * -(-m // (block * parts))
        work += [
            (r, t, p * step, (p + 1) * step, p) for t in range(-(-(m if by_keys else n) // size)) for p in range(parts)
        ]
    return torch.tensor(work, dtype=torch.int32)


@pytest.mark.parametrize("parts", [1, 3])
def test_keys_in_pages_and_results_in_parts(parts):
    """Each tile's keys are cut among `parts` pieces of work; what they give is merged here, and equals the reference."""
    g = torch.Generator().manual_seed(0)
    cu_q, cu_k = cumulative([n for n, _ in LENGTHS]), cumulative([m for _, m in LENGTHS])
    q, k, v = (torch.randn(int(n[-1]), h, D, generator=g).bfloat16() for n, h in ((cu_q, HQ), (cu_k, HKV), (cu_k, HKV)))
    tokens, spec = q.shape[0], Spec(scale=SCALE, causal=True)
    leaves = [x[None].float().requires_grad_() for x in (q, k, v)]
    wants = [
        reference(*(x[:, c[r] : c[r + 1]] for x, c in zip(leaves, (cu_q, cu_k, cu_k), strict=True)), spec)
        for r in range(len(LENGTHS))
    ]
    want, want_lse = torch.cat([o for o, _ in wants], 1)[0], torch.cat([lse for _, lse in wants], 2)[0]
    grad = torch.randn(want.shape, generator=g).bfloat16()
    want_grads = torch.autograd.grad(want, leaves, grad.float())

    (keys, indptr, order), (values, _, _) = paged(k, cu_k), paged(v, cu_k)
    out = torch.zeros(parts, tokens, HQ, D, dtype=torch.bfloat16)
    lse = torch.full((parts, HQ, tokens), -torch.inf)
    queries = dense_view(1, tokens, HQ, D)
    results = dense_view(parts, tokens, HQ, D)
    cache = MatrixView((keys.shape[0] * PAGE, HKV * D), HKV * D, PAGE, 0, D)
    known = {
        "GROUP": HQ // HKV, "D": D, "DV": D, "CAUSAL": True, "WINDOW": False, "LISTED_WORK": True, "BLOCK_SPARSE": False,
        "PAGE": PAGE, "CAP": False, "SCORE": None, "MASK": None, "BITS": False,
    }  # fmt: skip
    numbers = (tokens, int(cu_k[-1]), 0, SCALE, 1.0, (), ())
    nothing = torch.zeros(1, dtype=torch.int32)
    counter = torch.zeros(1, dtype=torch.int32)
    launch = kernels_gluon.launcher(1, programs=2)

    def run(kernel, programs, descriptors, tensors, listed, *constants):
        pointers = (*tensors, listed, cu_q, cu_k, *(nothing,) * 5, indptr, order)
        Launch(kernel, (programs, 1, 1), descriptors, pointers, constants)(
            (q, keys, values, out, grad, dq, dk, dv), launch
        )

    dq = torch.zeros(parts, tokens, HQ, D, dtype=torch.bfloat16)
    dk, dv = torch.zeros_like(keys), torch.zeros_like(values)
    work = items(parts, 128, 128)
    views = (queries.steps, cache.steps, cache.steps)
    template = Template(
        **known, SINK=False, BOUNDED=False, BF16=True, ROPE=False, BM=128, BN=128, ST=3, QS=2, TURNS=True, LATE=False
    )
    with interpreter():
        run(
            _hopper_forward.forward, 2,
            (queries.descriptor(0, 64, D), *(cache.descriptor(i, PAGE, D) for i in (1, 2)), results.descriptor(3, 64, D)),
            (3, lse, nothing, nothing, nothing, counter), work, (0, 0, 0), views, HQ * D, tokens, HQ * tokens, HQ, *numbers,
            len(work), len(work) * HQ, template,
        )  # fmt: skip
    total = torch.logsumexp(lse, 0)
    merged = (out.float() * torch.exp(lse - total).transpose(1, 2)[..., None]).sum(0)
    assert (total - want_lse).abs().max() <= 1e-3
    assert (merged - want).abs().max() <= 2e-2

    delta = (want.detach() * grad.float()).sum(-1).T.contiguous()
    work = items(parts, 128, 64)
    views = (queries.steps, cache.steps, cache.steps, queries.steps)
    with interpreter():
        run(
            _hopper_backward_queries.backward_queries, len(work) * HQ,
            (
                queries.descriptor(0, 64, D), *(cache.descriptor(i, PAGE, D) for i in (1, 2)), queries.descriptor(4, 64, D),
                results.descriptor(5, 64, D),
            ),
            (5, total.contiguous(), delta), work, (0, 0, 0), views, HQ * D, tokens, HQ, *numbers, len(work),
            Template(**known, BM=128, BN=64, ST=4, SV=4, GRAD=None, ALIBI=0),
        )  # fmt: skip
        assert (dq.float().sum(0) - want_grads[0][0]).abs().max() <= 2e-2 * want_grads[0].abs().max()
        work = items(1, 128, 128, by_keys=True)
        run(
            _hopper_backward_keys.backward_keys, 2,
            (
                queries.descriptor(0, 64, D), *(cache.descriptor(i, PAGE, D) for i in (1, 2)), queries.descriptor(4, 64, D),
                *(cache.descriptor(i, PAGE, D) for i in (6, 7)), results.descriptor(5, 64, D // 2),
            ),
            (5, nothing, nothing, 6, 7, total.contiguous(), delta, counter), work, 1, 1, 0, (0, 0, 0), views, HKV * D, HKV * D,
            HQ, HKV, *numbers, len(work), len(work) * HKV,
            Template(
                **known, BM=64, ST=2, SO=2, WANT_DK=True, WANT_DV=True, VALUES=True, FUSED=False, LATE=False, STAGED=True,
                GRAD=None, ALIBI=0,
            ),
        )  # fmt: skip
    for got, exact in ((dk, want_grads[1]), (dv, want_grads[2])):
        assert (unpaged(got, indptr, order, cu_k).float() - exact[0]).abs().max() <= 2e-2 * exact.abs().max()
