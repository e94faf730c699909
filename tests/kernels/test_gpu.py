"""The GPU paths against fp64, measured by what a plain 16-bit implementation gets wrong."""

import pytest
import torch
from kernels_cases import available, check, inputs

from trainkit.kernels import attention
from trainkit.kernels._attention import _hopper

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def pooled(monkeypatch):
    """However short a sequence is: two passes are what `deterministic` tests."""
    monkeypatch.setattr(_hopper, "_pooled", lambda *_: True)


PATHS = ["hopper", "triton"]
DOC = torch.arange(8192) // 300
BIAS = torch.linspace(-2, 2, 8 * 64).view(8, 64)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("S", [1, 17, 200, 1023])
@pytest.mark.parametrize("path", PATHS)
def test_lengths(path, S, D, causal):
    check(path, 2, S, S, 4, 1 if S == 200 else 4, D, causal=causal)


@pytest.mark.parametrize("path", PATHS)
def test_long_and_grouped(path):
    check(path, 1, 4097, 4097, 8, 1, 128, causal=True)


@pytest.mark.parametrize("D", [64, 128, 256])
@pytest.mark.parametrize("sizes", [(100, 700), (700, 100)], ids=str)
@pytest.mark.parametrize("path", PATHS)
def test_causal_is_aligned_to_the_last_key(path, sizes, D):
    check(path, 2, *sizes, 8, 2, D, causal=True)


@pytest.mark.parametrize("heads", [(32, 32), (96, 96), (192, 192), (96, 40)], ids=str)
def test_other_head_sizes(heads):
    check("triton", 1, 200, 333, 4, 2, *heads, causal=True)


@pytest.mark.parametrize("widths", [(128, 64), (64, 128), (64, 256), (256, 128)], ids=str)
def test_values_of_another_width(widths):
    check("hopper", 1, 300, 333, 4, 2, *widths, causal=True)


VARIANTS = {
    "fp16": {"dtype": torch.float16, "causal": True},
    "window": {"window": 100},
    "causal window": {"window": 300, "causal": True},
    "window 1": {"window": 1, "causal": True},
    "softcap": {"softcap": 20.0, "causal": True},
    "alibi": {"alibi_slopes": 2.0 ** -torch.arange(1.0, 9.0), "causal": True},
    "sinks": {"sinks": torch.linspace(-2, 4, 8), "causal": True},
    "documents": {"mask_mod": lambda b, h, q, k: (DOC[q] == DOC[k]) & (q >= k)},
    "mask by head": {"mask_mod": lambda b, h, q, k: (q - k).abs() < 50 * (h + 1)},
    "mask by batch and head": {"mask_mod": lambda b, h, q, k: (q * k + h) % 7 > 2 * b, "causal": True},
    "score": {"score_mod": lambda s, b, h, q, k: s + BIAS[h, (q - k) % 64] * torch.tanh(s / 5)},
    "packed": {"cu_seqlens": [0, 1, 130, 130, 400, 1000], "causal": True},
}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("path", PATHS)
def test_variants(path, name, monkeypatch):
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in VARIANTS[name].items()}
    monkeypatch.setitem(globals(), "DOC", DOC.cuda())
    monkeypatch.setitem(globals(), "BIAS", BIAS.cuda())
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32, device="cuda")
    check(path, 1 if "cu_seqlens" in options else 2, 1000, 1000, 8, 2, 128, **options)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_documents(D, deterministic, monkeypatch):
    """Bits of blocks of every size, over ragged ends."""
    monkeypatch.setitem(globals(), "DOC", DOC.cuda())
    mask = lambda b, h, q, k: DOC[q] == DOC[k]  # noqa: E731
    check("hopper", 1, 700, 1000, 4, 2, D, mask_mod=mask, causal=True, deterministic=deterministic)


@pytest.mark.parametrize("path", PATHS)
def test_documents_that_change(path):
    """What is kept of a mask goes when its table is written to."""
    available(path)
    q, k, v = inputs(1, 500, 500, 2, 2, 64, 64, torch.bfloat16)
    doc = torch.arange(500, device="cuda") // 90
    mask = lambda b, h, i, j: doc[i] == doc[j]  # noqa: E731
    for _ in range(3):
        want = attention(q.float(), k.float(), v.float(), mask_mod=mask, backend="reference")
        assert (attention(q, k, v, mask_mod=mask, backend=path) - want).norm() <= 1e-2 * want.norm()
        doc.copy_(doc.roll(37))


@pytest.mark.parametrize("path", PATHS)
def test_learned_tables(path):
    available(path)
    table = torch.randn(8, 64, device="cuda", requires_grad=True)
    q, k, v = inputs(2, 300, 300, 8, 2, 64, 64, torch.bfloat16)
    mod = lambda s, b, h, i, j: s + table[h, (i - j) % 64]  # noqa: E731
    grads = []
    for backend in (path, "reference"):
        out = attention(q, k, v, score_mod=mod, causal=True, backend=backend)
        grads.append(torch.autograd.grad(out.float().square().sum(), table)[0])
    assert (grads[0] - grads[1]).abs().max() <= 2e-2 * grads[1].abs().max()


def test_fp32_sigmoid_and_dropout():
    q, k, v = (x.requires_grad_() for x in inputs(1, 300, 200, 4, 2, 64, 64, torch.float32))
    for options in ({"softmax": "sigmoid"}, {"dropout_p": 0.3, "seed": 9}):
        results = []
        for backend in ("triton", "reference"):
            out = attention(q, k, v, causal=True, backend=backend, **options)
            results.append((out, *torch.autograd.grad(out.sin().sum(), (q, k, v))))
        for ours, theirs in zip(*results, strict=True):
            assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max().clamp(min=1)


@pytest.mark.parametrize("path", PATHS)
def test_every_run_gives_the_same_bits(path):
    available(path)
    leaves = [x.requires_grad_() for x in inputs(2, 1000, 1000, 8, 2, 128, 128, torch.bfloat16)]
    runs = []
    for _ in range(10):
        out = attention(*leaves, causal=True, deterministic=True, backend=path)
        runs.append((out, *torch.autograd.grad(out.float().square().sum(), leaves)))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


@pytest.mark.parametrize("path", PATHS)
def test_layouts(path):
    """Heads outside, heads inside, slices of a fused projection, and odd strides give the same numbers."""
    available(path)
    q, k, v = inputs(2, 300, 300, 4, 4, 128, 128, torch.bfloat16)
    want = attention(q, k, v, backend=path)
    fused = torch.cat([x.flatten(2) for x in (q, k, v)], -1)
    slices = [x.unflatten(2, (4, 128)) for x in fused.chunk(3, -1)]
    outside = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    odd = [torch.cat([x, x[..., :1]], -1)[..., :-1] for x in (q, k, v)]
    for same in (slices, outside, odd):
        assert torch.equal(attention(*same, backend=path), want)


def rope_tables(positions, D):
    angles = torch.arange(positions, device="cuda")[:, None] / 10000.0 ** (
        torch.arange(D // 2, device="cuda") / (D // 2)
    )
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("path", PATHS)
def test_rope_and_hooks(path):
    available(path)
    tensors = inputs(2, 200, 300, 8, 2, 128, 128, torch.bfloat16)
    options = {
        "rope": rope_tables(300, 128),
        "output_mod": lambda x, pair, b, h, i, d: x * (h + 1) + pair,
        "causal": True,
    }
    results = []
    for backend, dtype in ((path, torch.bfloat16), ("reference", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = attention(*leaves, backend=backend, **options)
        results.append((out, *torch.autograd.grad(out.float().sin().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 2e-2 * want.norm()


def test_compiled_rope():
    q, k, v = (x.requires_grad_() for x in inputs(2, 256, 256, 4, 2, 64, 64, torch.bfloat16))
    call = lambda q, k, v: attention(q, k, v, causal=True, rope=rope_tables(256, 64))  # noqa: E731
    results = []
    for run in (torch.compile(call, fullgraph=True), call):
        out = run(q, k, v)
        results.append((out, *torch.autograd.grad(out.float().sin().sum(), (q, k, v))))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-2 * want.norm()


def test_sdpa_runs_our_kernels():
    import torch.nn.attention as registry
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from trainkit.kernels import register_torch

    if not hasattr(registry, "register_flash_attention_impl"):
        pytest.skip("this PyTorch has no registry of flash attention kernels")
    leaves = [x.transpose(1, 2).requires_grad_() for x in inputs(2, 300, 300, 4, 2, 128, 128, torch.bfloat16)]
    call = torch.nn.functional.scaled_dot_product_attention

    def run():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = call(*leaves, is_causal=True, enable_gqa=True)
            return out, *torch.autograd.grad(out.float().sin().sum(), leaves)

    theirs = run()
    registry.activate_flash_attention_impl(register_torch())
    try:
        ours = run()
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION), pytest.raises(ValueError, match=r"dropout_p=0\.5"):
            call(*leaves, dropout_p=0.5, enable_gqa=True)
    finally:
        registry.restore_flash_attention_impl()
    again = run()
    for a, b, c in zip(ours, theirs, again, strict=True):
        assert (a - b).norm() <= 2e-2 * b.norm()
        assert torch.equal(b, c) or (b - c).norm() <= 1e-3 * b.norm()
    assert not torch.equal(ours[0], theirs[0])
    want = attention(*(x.transpose(1, 2) for x in leaves), causal=True).transpose(1, 2)
    assert torch.equal(ours[0], want)


@pytest.mark.parametrize("D", [64, 128])
def test_long_sequences_take_other_tiles(D):
    """Three warpgroups forward at 64 columns, dQ one block late at 128: long sequences only."""
    available("hopper")
    tensors = inputs(1, 4200, 8300, 2, 1, D, D, torch.bfloat16)
    results = []
    for backend, dtype in (("hopper", torch.bfloat16), ("reference", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = attention(*leaves, backend=backend, causal=True)
        results.append((out, *torch.autograd.grad(out.float().sin().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 2e-2 * want.norm()


@pytest.mark.parametrize("name", VARIANTS)
def test_variants_with_sums_of_dq(name, monkeypatch):
    """At 64 columns dQ is summed over programs at any length, under every mask."""
    options = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in VARIANTS[name].items()}
    monkeypatch.setitem(globals(), "DOC", DOC.cuda())
    monkeypatch.setitem(globals(), "BIAS", BIAS.cuda())
    if "cu_seqlens" in options:
        options["cu_seqlens"] = torch.tensor(options["cu_seqlens"], dtype=torch.int32, device="cuda")
    check("hopper", 1 if "cu_seqlens" in options else 2, 1000, 1000, 8, 2, 64, **options)


@pytest.mark.parametrize(
    ("B", "Sq", "Sk", "Hq", "Hkv", "D"),
    [(16, 1100, 1100, 8, 8, 64), (4, 2100, 2100, 16, 8, 128), (2, 300, 5000, 32, 16, 128)],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 300}], ids=str)
def test_sums_of_dq_take_turns(B, Sq, Sk, Hq, Hkv, D, options):
    """More heads than the pool of fp32 sums has slots for: each slot serves several."""
    available("hopper")
    leaves = [x.requires_grad_() for x in inputs(B, Sq, Sk, Hq, Hkv, D, D, torch.bfloat16)]
    grad = torch.randn(B, Sq, Hq, D, device="cuda", dtype=torch.bfloat16)
    exact = torch.autograd.grad(attention(*leaves, backend="hopper", deterministic=True, **options), leaves, grad)
    out = attention(*leaves, backend="hopper", **options)
    for _ in range(5):
        for got, want in zip(torch.autograd.grad(out, leaves, grad, retain_graph=True), exact, strict=True):
            assert got.isfinite().all()
            assert (got.float() - want.float()).norm() <= 5e-3 * want.float().norm()


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("D", [64, 128, 256])
def test_rope_in_the_load(D, packed):
    available("hopper")
    ends = [0, 70, 71, 300]
    sizes = (1, 300, 300) if packed else (2, 200, 300)
    tensors = inputs(*sizes, 4, 2, D, D, torch.bfloat16)
    options = {"rope": rope_tables(300, D), "causal": True}
    if packed:
        options["cu_seqlens"] = torch.tensor(ends, device="cuda", dtype=torch.int32)
    results = []
    for backend, dtype in (("hopper", torch.bfloat16), ("reference", torch.float32)):
        leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = attention(*leaves, backend=backend, **options)
        results.append((out, *torch.autograd.grad(out.float().sin().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 2e-2 * want.norm()


def test_a_compiled_loss_and_gate_are_one_graph():
    from trainkit.kernels import linear_cross_entropy, swiglu

    g = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(2, 60, 128, device="cuda", generator=g).bfloat16().requires_grad_()
    up, head = (torch.randn(n, 128, device="cuda", generator=g).bfloat16().requires_grad_() for n in (256, 1000))
    target = torch.randint(1000, (2, 60), device="cuda")

    def call(x, up, head):
        return linear_cross_entropy(swiglu(x @ up.T), head, target)

    results = []
    for run in (torch.compile(call, fullgraph=True), call):
        loss = run(x, up, head)
        results.append((loss, *torch.autograd.grad(loss, (x, up, head))))
    for got, want in zip(*results, strict=True):
        assert (got - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize(
    ("vocabulary", "dtype"), [(50304, torch.bfloat16), (8224, torch.float16), (4096, torch.float32)]
)
def test_a_loss_whose_rows_are_kept(vocabulary, dtype):
    available("hopper")
    from trainkit.kernels import linear_cross_entropy
    from trainkit.kernels.fused._loss_chunks import keeps

    g = torch.Generator("cuda").manual_seed(0)
    x, weight = (torch.randn(n, 128, device="cuda", generator=g, dtype=dtype) for n in (300, vocabulary))
    weight *= 0.3
    target = torch.randint(vocabulary, (300,), device="cuda")
    target[7], target[8], target[9] = -100, 0, vocabulary - 1
    assert keeps(x, vocabulary)
    leaves = [t.requires_grad_() for t in (x, weight)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    got, want = (
        linear_cross_entropy(*leaves, target, chunk=128),
        torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, target),
    )
    assert (got - want).abs() <= 1e-3 * want
    for a, b in zip(torch.autograd.grad(got, leaves), torch.autograd.grad(want, exact), strict=True):
        assert (a - b).norm() <= 1e-2 * b.norm()
