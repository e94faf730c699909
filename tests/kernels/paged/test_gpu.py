"""Paged attention on a GPU: errors against fp64, graphs replayed under other plans, no waits."""

import pytest
import torch
from paged_cases import batch, planned, tensors

from trainkit.kernels import Maximum, PagedAttention, attention, sample, tree_attention
from trainkit.kernels.fused._sample import reference

pytestmark = pytest.mark.gpu


def check(made, Hq, Hkv, D, dtype=torch.bfloat16, backward=True, **options):
    """Errors against fp64, at most twice those of the reference on rounded inputs, whose output is rounded once."""
    q, cache = tensors(made, Hq, Hkv, D, dtype=dtype, device="cuda")
    grad = torch.randn_like(q)
    found = []
    for backend, kind in (("triton", dtype), ("reference", torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in (q, cache)]
        out, lse = planned(PagedAttention(backend=backend, **options), made, *leaves).run(*leaves)
        grads = torch.autograd.grad(out, leaves, grad.to(kind)) if backward else ()
        found.append((out.detach(), lse.detach(), *grads))
    for name, ours, exact in zip(("out", "lse", "dq", "dcache"), *found, strict=False):
        fine = exact.isfinite()
        assert torch.equal(fine, ours.isfinite()), name
        error = (ours.double() - exact)[fine].abs().max() / exact[fine].abs().max()
        assert error < (1e-3 if name == "lse" else 2**-7 if dtype == torch.bfloat16 else 2**-9), (name, error)


CASES = {
    "decoding": (([1] * 9), (1, 37, 5000, 0, 16, 4096, 777, 64, 65)),
    "mixed": ((1, 300, 1, 17, 64), (900, 300, 33, 1000, 4096)),
    "long": ((1,), (30_000,)),
}


@pytest.mark.parametrize("page", [1, 16, 128])
@pytest.mark.parametrize("heads", [(8, 8), (32, 8), (16, 1)])
@pytest.mark.parametrize("name", CASES)
def test_errors(name, heads, page):
    check(batch(*CASES[name], page), *heads, 128, backward=page == 16)


@pytest.mark.parametrize("options", [{"window": 100}, {"softcap": 5.0}, {"causal": False}])
def test_variants(options):
    check(batch(*CASES["mixed"], 16), 8, 2, 64, torch.float16, **options)


def test_shared_prefix():
    check(batch([1] * 40, [2048 + 16 * i for i in range(40)], 16, prefix=120), 32, 8, 128, backward=False)


def test_replans_of_a_graph_without_a_wait():
    """Captured once, 50 sets of lengths, nothing waits, nothing is compiled again."""
    most = Maximum(16, 16, 16 * 64)
    g = torch.Generator().manual_seed(0)
    cache = torch.randn(2000, 2, 16, 2, 128, device="cuda", dtype=torch.bfloat16)
    q = torch.randn(16, 8, 128, device="cuda", dtype=torch.bfloat16)
    paged, plain = PagedAttention(), PagedAttention(backend="reference")
    graph = None
    for _ in range(50):
        count = int(torch.randint(1, 17, (), generator=g))
        lengths = torch.randint(0, 1025, (count,), generator=g).tolist()
        made = batch([1] * count, lengths, 16, spare=2000 - sum(-(-n // 16) for n in lengths))
        torch.cuda.set_sync_debug_mode("error")
        try:
            planned(paged, made, q[:count], cache, cuda_graph_max=most)
            if graph is not None:
                graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        if graph is None:
            paged.run(q, cache)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out, lse = paged.run(q, cache)
            graph.replay()
        want, want_lse = planned(plain, made, q[:count], cache).run(q[:count], cache)
        torch.testing.assert_close(out[:count], want, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(lse[:count], want_lse, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    "parents, lengths",
    [([-1, 0, 0, 0], [700, 200, 333, 64]), ([-1, 0, 1, 1, 0, -1, 5], [300, 64, 70, 1, 200, 500, 33])],
)
def test_trees(parents, lengths, dtype):
    indptr = torch.tensor([0, *lengths]).cumsum(0).int()
    q, k, v, grad = (torch.randn(1, int(indptr[-1]), h, 128, device="cuda", dtype=dtype) for h in (8, 2, 2, 8))
    found = []
    for backend, kind in (("auto", dtype), ("reference", torch.float64)):
        leaves = [x.to(kind).requires_grad_() for x in (q, k, v)]
        out = tree_attention(*leaves, torch.tensor(parents).int(), indptr, backend=backend)
        found.append((out.detach(), *torch.autograd.grad(out, leaves, grad.to(kind))))
    for name, ours, exact in zip(("out", "dq", "dk", "dv"), *found, strict=True):
        assert ((ours.double() - exact).abs().max() / exact.abs().max()) < 2**-6, name


def test_short_prompts_cut_the_queries():
    """Few tiles of keys: the queries go to copies of them, and the sums are right."""
    indptr = torch.tensor([0, 256, 256 + 2048, 256 + 4096], dtype=torch.int32)
    q, k, v, grad = (torch.randn(1, int(indptr[-1]), 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    parents = torch.tensor([-1, 0, 0], dtype=torch.int32)
    mask = lambda b, h, i, j: (j <= i) & ((j < 256) | ((i < 2304) == (j < 2304)))  # noqa: E731
    found = []
    for run in (
        lambda *x: tree_attention(*x, parents, indptr),
        lambda *x: attention(*x, mask_mod=mask, backend="triton"),
    ):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        found.append(torch.autograd.grad(run(*leaves), leaves, grad))
    for ours, other in zip(*found, strict=True):
        assert ((ours.float() - other.float()).abs().max() / other.float().abs().max()) < 2**-6


def test_sampling():
    logits = torch.randn(64, 50_000, device="cuda") * 3
    rows = torch.arange(64, device="cuda")
    numbers = {
        "temperature": torch.full((64,), 0.8, device="cuda"), "top_k": (rows % 3 * 40).int(),
        "top_p": 1 - (rows % 5) / 10, "min_p": (rows % 2) * 0.02, "seed": rows, "step": rows * 3,
    }  # fmt: skip
    same = sample(logits, **numbers) == reference(logits, *numbers.values())
    # Sums in another order may move the line by one token.
    assert same.float().mean() >= 0.95


def test_generation_by_graphs():
    """The same tokens as without graphs, at changing numbers of requests; on the reference's attention, too."""
    pytest.importorskip("pytorch_lightning")
    from torch import nn

    from trainkit.demo._config import SIZES
    from trainkit.demo._model import GPT
    from trainkit.serving.generate import Sampling, generate

    torch.manual_seed(0)
    gpt = GPT(SIZES["tiny"], 256, 1e-3).cuda().eval()
    for weight in gpt.parameters():
        if weight.ndim == 2:
            nn.init.normal_(weight, std=0.15)
    prompts = [torch.randint(256, (n,)).tolist() for n in (3, 40, 17, 64, 5)]
    found = [
        generate(gpt, prompts, max_new_tokens=20, sampling=Sampling(temperature=0), max_batch=4, **more)
        for more in ({"cuda_graphs": True}, {}, {"backend": "reference"})
    ]
    assert found[0] == found[1] == found[2]
