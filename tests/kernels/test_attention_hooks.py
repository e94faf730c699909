"""Hooks of query, key and output, and RoPE: the plain path against formulas, the kernels against the plain path."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

from kernels_interpreter import interpreter

from trainkit.kernels import attention, register_torch, rope
from trainkit.kernels._attention import _hooks


def tensors(Sq, Sk, *, B=2, Hq=4, Hkv=2, D=12, dtype=torch.float64):
    g = torch.Generator().manual_seed(0)
    shapes = (B, Sq, Hq, D), (B, Sk, Hkv, D), (B, Sk, Hkv, D)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def tables(positions, D=12, dtype=torch.float64):
    angles = torch.arange(positions)[:, None] / 100.0 ** (torch.arange(D // 2) / (D // 2))
    return angles.cos().to(dtype), angles.sin().to(dtype)


def mixing(x, pair, b, h, idx, d):
    return torch.tanh(x * pair) + x * (h + 1) - 0.1 * idx * d + b


HOOKS = {"query_mod": mixing, "key_mod": lambda x, p, b, h, i, d: x * x - p / (i + 1), "output_mod": mixing}


@pytest.mark.parametrize("sizes", [(7, 7), (3, 9)], ids=str)
def test_rope_turns_the_last_query_with_the_last_key(sizes):
    q, k, v = tensors(*sizes)
    cos, sin = tables(11)
    got = attention(q, k, v, causal=True, rope=(cos, sin))
    first = sizes[1] - sizes[0]
    turned = [rope(x, cos[a : a + x.shape[1]], sin[a : a + x.shape[1]]) for x, a in ((q, first), (k, 0))]
    want = attention(*turned, v, causal=True)
    torch.testing.assert_close(got, want)
    g = torch.randn_like(got)
    for a, b in zip(*(torch.autograd.grad(o, (q, k, v), g) for o in (got, want)), strict=True):
        torch.testing.assert_close(a, b)


def test_hooks_are_what_they_say():
    q, k, v = tensors(5, 5)
    out = attention(q, k, v, backend="reference", **HOOKS)
    b, i, h, d = torch.meshgrid(*(torch.arange(n) for n in q.shape), indexing="ij")
    pair = q.roll(6, -1)
    turned = mixing(q, pair, b, h, i, d)
    key = k * k - k.roll(6, -1) / (torch.arange(5)[None, :, None, None] + 1)
    plain = attention(turned, key, v, backend="reference")
    torch.testing.assert_close(out, mixing(plain, plain.roll(6, -1), b, h, i, d))


@pytest.mark.parametrize(("dtype", "packed"), [(torch.float32, False), (torch.float32, True), (torch.bfloat16, False)])
def test_kernels_agree(dtype, packed):
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are tested on it: tests/kernels/test_gpu.py")
    leaves = tensors(9, 11, B=1, Hq=2, Hkv=1, dtype=dtype)
    # Hooks that multiply would multiply bf16's rounding too.
    options = dict(HOOKS if dtype == torch.float32 else {}, rope=tables(30, dtype=torch.float32))
    if packed:
        options["cu_seqlens"] = tuple(torch.tensor(x, dtype=torch.int32) for x in ([0, 5, 5, 9], [0, 6, 7, 11]))
    results = []
    with interpreter():
        for backend in ("triton", "reference"):
            out = attention(*leaves, backend=backend, causal=True, **options)
            loss = (out.float() * torch.sin(torch.arange(out.numel())).view(out.shape)).sum()
            results.append((out, *torch.autograd.grad(loss, leaves)))
    bound = 2e-5 if dtype == torch.float32 else 2e-2
    for got, want in zip(*results, strict=True):
        assert (got - want).abs().max() <= bound * want.abs().max()


def test_a_hook_is_traced_once_a_function():
    x = torch.zeros((), dtype=torch.float32)
    scale = torch.ones(4)
    hook = lambda x, p, b, h, i, d: x * scale[h]  # noqa: E731
    assert _hooks.trace(hook, x.device).compiled is _hooks.trace(hook, x.device).compiled
    other = lambda x, p, b, h, i, d: x * scale[h] + 1  # noqa: E731
    assert _hooks.trace(other, x.device).compiled is not _hooks.trace(hook, x.device).compiled


BAD = [
    ({"rope": tables(4)}, r"at least 5 positions, 12/2.*\[4, 6\]"),
    ({"rope": tables(9, 10)}, r"12/2\].*\[9, 5\]"),
    ({"rope": tuple(t.requires_grad_() for t in tables(9))}, "must not require gradients"),
    ({"query_mod": 3}, "query_mod must be a function.*int"),
]


@pytest.mark.parametrize("case", BAD, ids=lambda c: c[1])
def test_bad_hooks_are_refused(case):
    with pytest.raises(ValueError, match=case[1]):
        attention(*tensors(5, 5), **case[0])


def test_rope_and_hooks_refuse_what_has_no_pair_or_position():
    q, k, v = tensors(5, 3)
    with pytest.raises(ValueError, match="as many queries as keys, got 5 and 3"):
        attention(q, k, v, rope=tables(9))
    odd = tensors(3, 3, D=5)
    with pytest.raises(ValueError, match="even head_dim, got 5"):
        attention(*odd, query_mod=mixing)
    learned = torch.ones(4, requires_grad=True)
    with pytest.raises(ValueError, match=r"captures get no gradients, got \[\[4\]\]"), interpreter():
        attention(
            *tensors(3, 3, dtype=torch.float32), query_mod=lambda x, p, b, h, i, d: x * learned[h], backend="triton"
        )


def test_compiled_rope_is_the_formula():
    q, k, v = tensors(6, 8, dtype=torch.float32)
    cos, sin = tables(8, dtype=torch.float32)
    call = lambda q, k, v: attention(q, k, v, rope=(cos, sin))  # noqa: E731
    torch.testing.assert_close(torch.compile(call, backend="aot_eager")(q, k, v), call(q, k, v))


def test_torch_knows_the_name():
    registry = pytest.importorskip("torch.nn.attention")
    if not hasattr(registry, "register_flash_attention_impl"):
        pytest.skip("this PyTorch has no registry of flash attention kernels")
    assert register_torch() in registry.list_flash_attention_impls()
    registry.activate_flash_attention_impl("trainkit")
    assert registry.current_flash_attention_impl() == "trainkit"
    registry.restore_flash_attention_impl()
    assert registry.current_flash_attention_impl() is None


@pytest.mark.parametrize("memory", ["[B, H, S, D]", "[B, S, H, D]"])
def test_flash_attention_of_torch_gives_the_strides_that_a_compiled_graph_counts_on(memory):
    """PyTorch's own kernels lay results out as their inputs are, and its fake tensors say so."""
    pytest.importorskip("triton")
    from trainkit.kernels import _torch_attention

    g = torch.Generator().manual_seed(0)
    heads_first = memory == "[B, H, S, D]"
    shape = (2, 4, 6, 16) if heads_first else (2, 6, 4, 16)
    q, k, v, grad = (torch.randn(shape, generator=g) for _ in range(4))
    q, k, v, grad = (x if heads_first else x.transpose(1, 2) for x in (q, k, v, grad))
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
    with interpreter():
        out, lse, *_, seed, offset, _ = _torch_attention.forward(q, k, v, is_causal=True)
        grads = _torch_attention.backward(
            grad, q, k, v, out, lse, None, None, 6, 6, 0.0, True, seed, offset, scale=None
        )
    pairs = zip((out, *grads), (want, *torch.autograd.grad(want, leaves, grad.double())), (q, q, k, v), strict=True)
    for got, exact, like in pairs:
        torch.testing.assert_close(got.double(), exact, atol=1e-5, rtol=0)
        assert got.stride() == like.stride()
