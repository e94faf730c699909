"""The operators that torch.compile sees."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

from kernels_interpreter import interpreter

from trainkit.kernels import attention
from trainkit.kernels._attention._ops import attention_op


@pytest.fixture(autouse=True)
def interpreted():
    if torch.cuda.is_available():
        yield "cuda"
    else:
        with interpreter():
            yield "cpu"


def arguments(device, *, packed=False, sinks=True):
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 10, h, 16, generator=g).to(device).requires_grad_() for h in (4, 2, 2))
    cu = torch.tensor([0, 3, 10], dtype=torch.int32, device=device) if packed else None
    sink = torch.zeros(4, device=device, requires_grad=True) if sinks else None
    return q, k, v, sink, None, cu, cu, True, None, 2.0, 0.25, False, 0.0, 0, False


@pytest.mark.parametrize("options", [{}, {"packed": True, "sinks": False}], ids=str)
def test_opcheck(interpreted, options):
    # Dynamic shapes trace the same fake functions once more; two variants of each call keep the run short.
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(attention_op, arguments(interpreted, **options), test_utils=tests)


def test_operator_is_the_function(interpreted):
    q, k, v, sinks, *rest = arguments(interpreted)
    out, lse = attention_op(q, k, v, sinks, *rest)
    want, want_lse = attention(q, k, v, sinks=sinks, causal=True, softcap=2.0, return_lse=True, backend="reference")
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, want_lse, rtol=1e-4, atol=1e-5)
    grads, wants = (
        torch.autograd.grad(o.sin().sum() + s.sum(), (q, k, v, sinks)) for o, s in ((out, lse), (want, want_lse))
    )
    for a, b in zip(grads, wants, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_compiles_without_a_break(interpreted):
    """On a GPU the operator, on a CPU SDPA or the reference: one graph either way."""
    q, k, v, *_ = arguments(interpreted)
    options = {"causal": True, "softcap": 3.0, "window": 4}
    backend = "inductor" if interpreted == "cuda" else "aot_eager"
    run = torch.compile(lambda q, k, v: attention(q, k, v, **options).sin(), fullgraph=True, backend=backend)
    got, want = run(q, k, v), attention(q, k, v, **options).sin()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_calls_with_functions_run_between_graphs(interpreted):
    q, k, v, *_ = arguments(interpreted)
    call = lambda q, k, v: attention(q * 2, k, v, score_mod=lambda s, b, h, i, j: s + i - j, backend="triton").sin()  # noqa: E731
    got, want = torch.compile(call, backend="aot_eager")(q, k, v), call(q, k, v)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(o.sum(), (q, k, v)) for o in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
