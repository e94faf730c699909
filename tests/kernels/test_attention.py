"""The reference attention and the dispatcher against a row-by-row fp64 definition."""

import math
import os
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainkit.kernels import attention


def by_rows(q, k, v, *, causal=False, window=None, softcap=None, slopes=None, sinks=None, score=None, mask=None,
            scale=None, sigmoid=False):  # fmt: skip
    """One row and one key at a time, in the inputs' precision: (out, lse)."""
    B, Sq, Hq, D = q.shape
    Sk, group = k.shape[1], Hq // k.shape[2]
    scale = D**-0.5 if scale is None else scale
    index = torch.tensor
    out, lse = q.new_zeros(B, Sq, Hq, v.shape[3]), q.new_full((B, Hq, Sq), -torch.inf)
    outs, lses = {}, {}
    for b in range(B):
        for h in range(Hq):
            for i in range(Sq):
                p, scores, cols = i + Sk - Sq, [], []
                for j in range(Sk):
                    if causal and j > p:
                        continue
                    if window is not None and not (0 <= p - j < window if causal else abs(p - j) < window):
                        continue
                    if mask is not None and not mask(index(b), index(h), index(i), index(j)):
                        continue
                    s = torch.dot(q[b, i, h], k[b, j, h // group]) * scale
                    if softcap is not None:
                        s = softcap * torch.tanh(s / softcap)
                    if slopes is not None:
                        s = s - slopes[h] * abs(p - j)
                    if score is not None:
                        s = score(s, index(b), index(h), index(i), index(j))
                    scores.append(s)
                    cols.append(j)
                if not scores:
                    continue
                s = torch.stack(scores)
                values = v[b, cols, h // group]
                if sigmoid:
                    outs[b, i, h] = torch.sigmoid(s) @ values
                    continue
                logits = s if sinks is None else torch.cat([s, sinks[h].reshape(1)])
                total = torch.logsumexp(logits, 0)
                outs[b, i, h], lses[b, h, i] = torch.exp(s - total) @ values, total
    for key, value in outs.items():
        out = out.index_put(tuple(torch.tensor(x) for x in key), value)
    for key, value in lses.items():
        lse = lse.index_put(tuple(torch.tensor(x) for x in key), value)
    return out, lse


def tensors(Sq, Sk, *, B=2, Hq=4, Hkv=2, D=5, Dv=3, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (B, Sq, Hq, D), (B, Sk, Hkv, D), (B, Sk, Hkv, Dv)
    return [torch.randn(s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def slopes(heads):
    return 2.0 ** -torch.arange(1, heads + 1).double()


BIAS = torch.linspace(-1, 1, 64, dtype=torch.float64)

VARIANTS = {
    "plain": ({}, {}),
    "causal": ({"causal": True}, {"causal": True}),
    "window": ({"window": 3}, {"window": 3}),
    "causal window 1": ({"causal": True, "window": 1}, {"causal": True, "window": 1}),
    "softcap": ({"softcap": 0.7, "scale": 1.3}, {"softcap": 0.7, "scale": 1.3}),
    "alibi": ({"causal": True, "alibi_slopes": slopes(4)}, {"causal": True, "slopes": slopes(4)}),
    "score_mod": (
        {"score_mod": lambda s, b, h, i, j: s * BIAS[i + j] + torch.where(i > j, h, b)},
        {"score": lambda s, b, h, i, j: s * BIAS[i + j] + torch.where(i > j, h, b)},
    ),
    "mask_mod": (
        {"mask_mod": lambda b, h, i, j: (i // 2 == j // 2) | (h == 1)},
        {"mask": lambda b, h, i, j: (i // 2 == j // 2) | (h == 1)},
    ),
    "sigmoid": ({"softmax": "sigmoid", "causal": True}, {"sigmoid": True, "causal": True}),
    "order": (
        {"softcap": 1.1, "alibi_slopes": slopes(4), "score_mod": lambda s, b, h, i, j: 2 * s, "window": 4},
        {"softcap": 1.1, "slopes": slopes(4), "score": lambda s, b, h, i, j: 2 * s, "window": 4},
    ),
}


@pytest.mark.parametrize("sizes", [(1, 1), (5, 5), (3, 7), (6, 2)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_reference_matches_the_definition(name, sizes):
    ours, theirs = VARIANTS[name]
    q, k, v = tensors(*sizes)
    lse_too = "sigmoid" not in name
    got = attention(q, k, v, backend="reference", return_lse=lse_too, **ours)
    out, lse = got if lse_too else (got, None)
    want, want_lse = by_rows(q, k, v, **theirs)
    torch.testing.assert_close(out, want, rtol=1e-12, atol=1e-12)
    g = torch.randn(out.shape, dtype=out.dtype, generator=torch.Generator().manual_seed(1))
    loss, want_loss = (out * g).sum(), (want * g).sum()
    if lse is not None:
        torch.testing.assert_close(lse, want_lse, rtol=1e-12, atol=1e-12)
        loss, want_loss = (
            x + torch.where(y.isfinite(), y, 0).sin().sum() for x, y in ((loss, lse), (want_loss, want_lse))
        )
    for a, b in zip(torch.autograd.grad(loss, (q, k, v)), torch.autograd.grad(want_loss, (q, k, v)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-11)


def test_sinks_join_the_denominator_and_get_gradients():
    q, k, v = tensors(4, 6)
    sinks = torch.tensor([0.5, -3.0, 2.0, 9.0], dtype=torch.float64, requires_grad=True)
    out, lse = attention(q, k, v, causal=True, sinks=sinks, return_lse=True)
    want, want_lse = by_rows(q, k, v, causal=True, sinks=sinks)
    torch.testing.assert_close(out, want)
    torch.testing.assert_close(lse, want_lse)
    grads, wants = (
        torch.autograd.grad(o.square().sum() + s.sum(), (q, k, v, sinks)) for o, s in ((out, lse), (want, want_lse))
    )
    for a, b in zip(grads, wants, strict=True):
        torch.testing.assert_close(a, b)


def test_captured_tensors_get_gradients():
    q, k, v = tensors(4, 4)
    bias = torch.randn(4, 16, dtype=torch.float64, requires_grad=True)
    mod = lambda s, b, h, i, j: s + bias[h, i - j + 5]  # noqa: E731
    got = torch.autograd.grad(attention(q, k, v, score_mod=mod).sin().sum(), bias)
    want = torch.autograd.grad(by_rows(q, k, v, score=mod)[0].sin().sum(), bias)
    torch.testing.assert_close(got, want)
    assert got[0].abs().max() > 0


def test_rows_without_keys_give_zero_and_minus_infinity():
    q, k, v = tensors(5, 2)
    for extra in ({"causal": True}, {"causal": True, "sinks": torch.zeros(4, dtype=torch.float64)}):
        out, lse = attention(q, k, v, return_lse=True, **extra)
        assert (out[:, :3] == 0).all() and (lse[:, :, :3] == -torch.inf).all() and lse[:, :, 3:].isfinite().all()
        for grad in torch.autograd.grad(out.sum() + lse[:, :, 3:].sum(), (q, k, v)):
            assert grad.isfinite().all()
    out, lse = attention(q, k[:, :0], v[:, :0], return_lse=True)
    assert (out == 0).all() and (lse == -torch.inf).all() and out.shape == (2, 5, 4, 3)
    assert attention(q[:, :0], k, v).shape == (2, 0, 4, 3)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=4), st.booleans())
def test_packed_sequences_are_separate_calls(lengths, causal):
    cu = [torch.tensor([0, *accumulate(n[side] for n in lengths)], dtype=torch.int32) for side in (0, 1)]
    q, k, v = tensors(int(cu[0][-1]), int(cu[1][-1]), B=1)
    table = torch.rand(len(lengths), 4, dtype=torch.float64)
    mod = lambda s, b, h, i, j: s + (i - j) * 0.1 + b  # noqa: E731
    same = {"causal": causal, "return_lse": True}
    out, lse = attention(q, k, v, cu_seqlens=(cu[0], cu[1]), score_mod=mod, alibi_slopes=table, **same)
    for n in range(len(lengths)):
        rows, cols = (slice(int(c[n]), int(c[n + 1])) for c in cu)
        alone = lambda s, b, h, i, j, n=n: mod(s, b + n, h, i, j)  # noqa: E731
        part = q[:, rows], k[:, cols], v[:, cols]
        want, want_lse = attention(*part, score_mod=alone, alibi_slopes=table[n], **same)
        torch.testing.assert_close(out[:, rows], want)
        torch.testing.assert_close(lse[:, :, rows], want_lse)


def test_dropout_is_seeded_scaled_and_replayed():
    q, k, v = tensors(40, 50, D=4, Dv=50, Hkv=4)
    v = torch.eye(50, dtype=torch.float64)[None, :, None].expand(2, 50, 4, 50)
    drop = lambda seed: attention(q, k, v, dropout_p=0.25, seed=seed)  # noqa: E731
    weights, dropped = attention(q, k, v), drop(7)
    torch.testing.assert_close(dropped, drop(7), rtol=0, atol=0)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], weights[kept] / 0.75)
    assert abs(kept.double().mean() - 0.75) < 0.01
    assert 0.5 < (kept == (drop(8) != 0)).double().mean() < 0.72  # independent masks agree in .75**2 + .25**2 = .625
    assert kept.double().mean((0, 1, 2)).min() > 0.6 and kept.double().mean((0, 2, 3)).min() > 0.6
    torch.manual_seed(3)
    first = attention(q, k, v, dropout_p=0.25)
    torch.manual_seed(3)
    torch.testing.assert_close(first, attention(q, k, v, dropout_p=0.25), rtol=0, atol=0)


@pytest.mark.parametrize(
    "extra", [{}, {"causal": True, "softcap": 2.0, "window": 2}, {"dropout_p": 0.3, "seed": 1}], ids=str
)
def test_gradcheck(extra):
    q, k, v = tensors(3, 4, B=1, D=3, Dv=2)
    sinks = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    call = lambda q, k, v, s: attention(q, k, v, sinks=s, return_lse=True, **extra)  # noqa: E731
    assert torch.autograd.gradcheck(call, (q, k, v, sinks))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)], ids=str)
def test_sdpa_serves_plain_calls_and_agrees(dtype, heads):
    q, k, v = tensors(17, 17, Hq=heads[0], Hkv=heads[1], D=8, Dv=8, dtype=dtype)
    out, why = attention(q, k, v, causal=True, explain=True)
    assert why.path == "sdpa" and "cpu" in why.reason
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    want = by_rows(*exact, causal=True)[0]
    g = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    grads, wants = torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(want, exact, g.double())
    bound = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for a, b in zip((out, *grads), (want, *wants), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b).abs().max() <= bound * b.abs().max()


def test_cpu_is_bit_reproducible_under_autograd():
    q, k, v = tensors(65, 65, Hq=8, Hkv=2, D=16, Dv=16, dtype=torch.float32)
    runs = []
    for _ in range(3):
        out = attention(q, k, v, causal=True)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


def test_non_contiguous_inputs():
    q, k, v = (x.detach() for x in tensors(6, 6, Hq=4, Hkv=4, D=4, Dv=4))
    strided = [torch.stack([x, x], -1)[..., 0].transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    for backend in ("sdpa", "reference"):
        torch.testing.assert_close(attention(*strided, backend=backend), by_rows(q, k, v)[0])


def test_the_dispatcher_says_why():
    q, k, v = tensors(3, 5)
    cases = [({"causal": True}, "top left"), ({"window": 2}, "variant"), ({"return_lse": True}, "lse")]
    for extra, reason in cases:
        why = attention(q, k, v, explain=True, **extra)[-1]
        assert why.path == "reference" and reason in why.reason
        with pytest.raises(ValueError, match=f"sdpa.*{reason}"):
            attention(q, k, v, backend="sdpa", **extra)


Q, K, V = (x.detach() for x in tensors(4, 4))
ONE = torch.tensor([0, 4], dtype=torch.int32)
TWO = torch.tensor([0, 2, 4], dtype=torch.int32)
BAD = [
    ((Q[0], K, V), {}, r"q must be \[batch.*\(4, 4, 5\)"),
    ((Q.long(), K, V), {}, "q must be bf16.*int64"),
    ((Q, K.float(), V), {}, "one dtype.*float64.*float32"),
    ((Q[:1], K, V), {}, "batch size, got 1, 2, 2"),
    ((Q, K[:, :3], V), {}, "k and v must share tokens"),
    ((Q[..., :4], K, V), {}, "share head_dim, got 4 and 5"),
    ((Q[:, :, :3], K, V), {}, "multiple of key heads, got 3 and 2"),
    ((Q.to("meta"), K, V), {}, "one device.*meta.*cpu"),
    ((Q, K, V), {"window": 0}, "at least 1, got 0"),
    ((Q, K, V), {"window": 2.0}, "at least 1, got 2.0"),
    ((Q, K, V), {"softcap": 0.0}, "softcap must be positive.*0.0"),
    ((Q, K, V), {"scale": math.nan}, "scale must be finite.*nan"),
    ((Q, K, V), {"softmax": "relu"}, "'softmax' or 'sigmoid', got 'relu'"),
    ((Q, K, V), {"softmax": "sigmoid", "return_lse": True}, "no denominator.*return_lse"),
    ((Q, K, V), {"dropout_p": 1.0}, "below 1, got 1.0"),
    ((Q, K, V), {"dropout_p": 0.1, "seed": -1}, "seed must be.*-1"),
    ((Q, K, V), {"alibi_slopes": torch.ones(3)}, r"alibi_slopes.*\[4\] or \[2, 4\].*\[3\]"),
    ((Q, K, V), {"alibi_slopes": torch.ones(4, requires_grad=True)}, "alibi_slopes must not require"),
    ((Q, K, V), {"sinks": torch.ones(4, dtype=torch.int32)}, r"sinks.*int32 \[4\]"),
    ((Q, K, V), {"score_mod": 3}, "score_mod must be a function.*int"),
    ((Q, K, V), {"mask_mod": lambda b, h, i, j: i - j}, "mask_mod must return booleans, got torch.int64"),
    ((Q, K, V), {"score_mod": lambda s, b, h, i, j: torch.stack([s, s])}, r"score_mod must return one number.*\[2\]"),
    ((Q, K, V), {"backend": "magic"}, "backend must be one of.*'magic'"),
    ((Q, K, V), {"cu_seqlens": ONE}, "batch must be 1 with cu_seqlens, got 2"),
    ((Q[:1], K[:1], V[:1]), {"cu_seqlens": ONE.long()}, r"int32 \[sequences \+ 1\].*int64"),
    ((Q[:1], K[:1], V[:1]), {"cu_seqlens": ONE - ONE.sign()}, "rise from 0 to its 4 tokens, got 0 to 3"),
    ((Q[:1], K[:1], V[:1]), {"cu_seqlens": torch.tensor([0, 3, 2, 4]).int()}, "step down"),
    ((Q[:1], K[:1], V[:1]), {"cu_seqlens": (ONE, TWO)}, "as many sequences.*1, 2"),
]  # fmt: skip


@pytest.mark.parametrize("case", BAD, ids=lambda c: c[2])
def test_bad_input_is_refused_with_rule_and_value(case):
    args, extra, message = case
    with pytest.raises(ValueError, match=message):
        attention(*args, **extra)


def test_a_triton_that_is_too_old_is_not_used(tmp_path: Path) -> None:
    """As torch 2.6 brings it: 3.2 has no `knobs`."""
    (tmp_path / "triton.py").write_text('__version__ = "3.2.0"\n')
    code = (
        "import torch; from trainkit.kernels import attention\n"
        "q = torch.randn(1, 4, 2, 16)\n"
        "attention(q, q, q), attention(q, q, q, softcap=2.0)\n"
        "try: attention(q, q, q, backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Triton must be 3.6 or newer, got 3.2.0" in done.stdout
