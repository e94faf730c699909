"""Kept launches, CUDA graphs and streams on a Hopper GPU; what a kept launch passes is tested in `test_kernels_launch.py`."""

import pytest
import torch
from kernels_cases import available, inputs

from trainkit.kernels import attention
from trainkit.kernels._attention import _hopper

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def pooled(monkeypatch):
    """However short a sequence is: two passes are what `deterministic` tests."""
    monkeypatch.setattr(_hopper, "_pooled", lambda *_: True)


def on_streams(rounds, call):
    """What `call` returns on three streams that run beside each other."""
    streams = [torch.cuda.Stream() for _ in range(3)]
    torch.cuda.synchronize()
    found = []
    for _ in range(rounds):
        for stream in streams:
            with torch.cuda.stream(stream):
                found.append(call())
    torch.cuda.synchronize()
    return found


def test_a_launch_is_kept_for_calls_like_it_alone():
    available("hopper")
    sinks = torch.randn(4, device="cuda")
    options = [
        {},
        {"causal": True},
        {"window": 50},
        {"scale": 0.3},
        {"softcap": 20.0},
        {"softcap": 9.0},
        {"sinks": sinks},
    ]
    for D in (64, 128, 256):
        for _ in range(2):
            for kind in options:
                q, k, v = inputs(2, 260, 260, 4, 2, D, D, torch.bfloat16)
                q, k, v = (x + torch.randn_like(x) for x in (q, k, v))
                # Not aligned, then laid out otherwise: neither is the launch before.
                off = torch.cat([q.flatten()[:1], q.flatten()])[1:].view(q.shape)
                want = attention(q, k, v, backend="triton", **kind)
                for x in (q, off, q.transpose(1, 2).contiguous().transpose(1, 2)):
                    got = attention(x, k, v, backend="hopper", **kind)
                    assert (got - want).norm() <= 1e-2 * want.norm(), kind


def misaligned(x):
    return torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape)


def heads_outside(x):
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def cut_from_wider_rows(x):
    return torch.cat([x, x[..., :1]], -1)[..., :-1]


@pytest.mark.parametrize(
    "kind",
    [
        {"causal": True},
        {"causal": True, "deterministic": True},
        {"window": 50},
        {"scale": 0.3},
        {"softcap": 20.0},
        {"sinks": torch.zeros(4)},
    ],
    ids=lambda kind: "-".join(kind),
)
@pytest.mark.parametrize("D", [64, 128, 256])
def test_a_backward_launch_is_kept_for_calls_like_it_alone(D, kind):
    available("hopper")
    kind = {name: x.cuda() if isinstance(x, torch.Tensor) else x for name, x in kind.items()}
    for _ in range(2):
        for options in ({}, kind):
            tensors = [
                *inputs(2, 260, 260, 4, 2, D, D, torch.bfloat16),
                inputs(2, 260, 260, 4, 2, D, D, torch.bfloat16)[0],
            ]
            tensors = [x + torch.randn_like(x) for x in tensors]
            with_lse = lambda leaves, path: attention(*leaves, backend=path, return_lse=True, **options)  # noqa: B023, E731
            leaves = [x.requires_grad_() for x in tensors[:3]]
            out, lse = with_lse(leaves, "triton")
            want = torch.autograd.grad(out, leaves, tensors[3], retain_graph=True)
            want_lse = torch.autograd.grad(lse.sum(), leaves[:2])
            # Each layout of each tensor in turn, then all in its own: none may take the launch of the one before.
            for layout in (torch.clone, misaligned, heads_outside, cut_from_wider_rows):
                for side in range(5):
                    mine = [layout(x.detach()) if side in (i, 4) else x.detach() for i, x in enumerate(tensors)]
                    leaves = [x.requires_grad_() for x in mine[:3]]
                    out, lse = with_lse(leaves, "hopper")
                    got = torch.autograd.grad(out, leaves, mine[3], retain_graph=True)
                    got_lse = torch.autograd.grad(lse.sum(), leaves[:2])
                    for ours, theirs in zip((*got, *got_lse), (*want, *want_lse), strict=True):
                        assert (ours - theirs).norm() <= 2e-2 * theirs.norm(), (options, layout, side)
            # A gradient without strides.
            leaves = [x.detach().requires_grad_() for x in tensors[:3]]
            got, want = (
                torch.autograd.grad(attention(*leaves, backend=path, **options).sum(), leaves)
                for path in ("hopper", "triton")
            )
            for ours, theirs in zip(got, want, strict=True):
                assert (ours - theirs).norm() <= 2e-2 * theirs.norm(), options


@pytest.mark.parametrize("D", [64, 128, 256])
def test_a_cuda_graph_of_forward_and_backward_replays_on_new_contents(D):
    available("hopper")
    tensors = inputs(2, 520, 520, 4, 2, D, D, torch.bfloat16)
    grad = torch.randn_like(tensors[0])

    def step(leaves):
        out = attention(*leaves, causal=True)
        return (out, *torch.autograd.grad(out, leaves, grad))

    want = step([x.clone().requires_grad_() for x in tensors])
    still = [torch.zeros_like(x).requires_grad_() for x in tensors]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(still)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(still)
    for _ in range(3):
        with torch.no_grad():
            for x, y in zip(still, tensors, strict=True):
                x.copy_(y)
            for x in results:
                x.zero_()
        graph.replay()
        for got, exact in zip(results, want, strict=True):
            assert (got - exact).norm() <= 5e-3 * exact.norm()
        for got, exact in zip(step([x.clone().requires_grad_() for x in tensors]), want, strict=True):
            assert (got - exact).norm() <= 5e-3 * exact.norm()


@pytest.mark.parametrize("packed", [False, True])
def test_backward_on_several_streams(packed):
    available("hopper")
    leaves = [x.requires_grad_() for x in inputs(1, 2000, 2000, 8, 8, 128, 128, torch.bfloat16)]
    grad = torch.randn_like(leaves[0])
    cu = torch.tensor([0, 3, 700, 2000], dtype=torch.int32, device="cuda") if packed else None
    want = torch.autograd.grad(attention(*leaves, causal=True, cu_seqlens=cu, backend="triton"), leaves, grad)
    for grads in on_streams(
        10, lambda: torch.autograd.grad(attention(*leaves, causal=True, cu_seqlens=cu), leaves, grad)
    ):
        for got, exact in zip(grads, want, strict=True):
            assert (got - exact).norm() <= 2e-2 * exact.norm()


def test_a_cuda_graph_replays_on_new_contents():
    available("hopper")
    tensors = inputs(2, 520, 520, 4, 2, 128, 128, torch.bfloat16)
    want = attention(*tensors, causal=True)
    graph = torch.cuda.CUDAGraph()
    still = [torch.zeros_like(x) for x in tensors]
    with torch.cuda.graph(graph):
        out = attention(*still, causal=True)
    for _ in range(3):
        for x, y in zip(still, tensors, strict=True):
            x.copy_(y)
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)
        assert torch.equal(attention(*tensors, causal=True), want)


def test_streams_do_not_share_a_counter_of_tiles():
    available("hopper")
    tensors = inputs(2, 2000, 2000, 8, 8, 128, 128, torch.bfloat16)
    want = attention(*tensors, causal=True)
    assert all(torch.equal(out, want) for out in on_streams(20, lambda: attention(*tensors, causal=True)))


@pytest.mark.parametrize("path", ["hopper", "triton"])
def test_a_cuda_graph_of_packed_sequences(path):
    """Lengths of the CPU are the graph's for good; those of the GPU cannot be read while it is captured."""
    available(path)
    leaves = [x.requires_grad_() for x in inputs(1, 600, 600, 4, 2, 128, 128, torch.bfloat16)]
    cu, grad = torch.tensor([0, 100, 100, 600], dtype=torch.int32), torch.randn_like(leaves[0])

    def step():
        out = attention(*leaves, causal=True, cu_seqlens=cu, backend=path)
        return (out, *torch.autograd.grad(out, leaves, grad))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        want = [x.clone() for x in step()]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
        with pytest.raises(ValueError, match="cannot be read from a GPU while a CUDA graph is captured"):
            attention(*leaves, causal=True, cu_seqlens=CU, backend=path)
    for _ in range(3):
        for x in results:
            x.detach().zero_()
        graph.replay()
        for got, exact in zip(results, want, strict=True):
            assert (got - exact).norm() <= 5e-3 * exact.norm()


CU = torch.tensor([0, 600], dtype=torch.int32, device="cuda" if torch.cuda.is_available() else "cpu")


def test_blocks_made_on_one_stream_are_not_used_on_another():
    """The second stream would read lists and bits before the first, which is kept busy, has made them."""
    available("hopper")
    q, k, v = inputs(1, 2000, 2000, 4, 4, 128, 128, torch.bfloat16)
    document = torch.arange(2000, device="cuda") // 300
    want = attention(q, k, v, mask_mod=lambda b, h, i, j: document[i] == document[j])
    for n in range(4):
        document = (torch.arange(2000, device="cuda") // 300).clone()
        mask = lambda b, h, i, j: document[i] == document[j]  # noqa: E731, B023
        first, second = torch.cuda.Stream(), torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(first):
            torch.cuda._sleep(10**8)
            attention(q, k, v, mask_mod=mask, backend="triton" if n % 2 else "hopper")
        with torch.cuda.stream(second):
            got = attention(q, k, v, mask_mod=mask, backend="triton" if n % 2 else "hopper")
        torch.cuda.synchronize()
        assert (got - want).norm() <= 5e-3 * want.norm()


@pytest.mark.parametrize("path", ["hopper", "triton"])
def test_wide_windows_and_many_batch_entries(path):
    available(path)
    leaves = [x.requires_grad_() for x in inputs(1, 300, 300, 2, 2, 64, 64, torch.bfloat16)]
    grad = torch.randn_like(leaves[0])
    want = torch.autograd.grad(attention(*leaves, causal=True, backend=path), leaves, grad)
    for window in (2**31 - 1, 2**31 - 40, 2**40):
        got = torch.autograd.grad(attention(*leaves, causal=True, window=window, backend=path), leaves, grad)
        for a, b in zip(got, want, strict=True):
            assert (a - b).norm() <= 5e-3 * b.norm()
    q, k, v = (x.requires_grad_() for x in inputs(70_000, 4, 4, 1, 1, 64, 64, torch.bfloat16))
    mask = lambda b, h, i, j: (j <= i) | (b % 2 == 0)  # noqa: E731
    grads = torch.autograd.grad(attention(q, k, v, mask_mod=mask, backend=path).sum(), (q, k, v))
    part = [x[-9:].detach().requires_grad_() for x in (q, k, v)]
    odd = lambda b, h, i, j: (j <= i) | ((b + 69_991) % 2 == 0)  # noqa: E731
    for a, b in zip(
        grads, torch.autograd.grad(attention(*part, mask_mod=odd, backend="reference").sum(), part), strict=True
    ):
        assert (a[-9:] - b).norm() <= 1e-2 * b.norm()
