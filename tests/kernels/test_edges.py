"""Where numbers wrap, what is kept goes stale, functions are constants, and gradients end: right, or refused by name."""

import gc
import os
import subprocess
import sys
import threading
import types
import weakref

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

from kernels_interpreter import interpreter
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

from trainkit.kernels import attention, linear_cross_entropy, rms_norm, rope, swiglu
from trainkit.kernels._attention import _codegen
from trainkit.kernels._attention._call import from_host
from trainkit.kernels._attention._spec import Packed
from trainkit.kernels._cache import Cache


@pytest.fixture(autouse=True)
def interpreted():
    if torch.cuda.is_available():
        pytest.skip("with a GPU the kernels are tested on it: tests/kernels/test_gpu.py")
    with interpreter():
        yield


def truth(q, k, v, *, causal=False, window=None, score=None, mask=None):
    """Attention in fp64, from its definition: `[B, S, H, D]` in and out."""
    B, Sq, H, D = q.shape
    Sk = k.shape[1]
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(H // x.shape[1], 1) for x in (k, v))
    s = q @ k.mT * D**-0.5
    b, h, i, j = (torch.arange(n).view([-1 if d == x else 1 for x in range(4)]) for d, n in enumerate((B, H, Sq, Sk)))
    seen = torch.ones(B, H, Sq, Sk, dtype=torch.bool)
    gap = i + Sk - Sq - j
    if causal:
        seen = seen & (gap >= 0)
    if window is not None:
        seen = seen & (gap.abs() < window)
    if mask is not None:
        seen = seen & mask(b, h, i, j)
    s = (s if score is None else score(s, b, h, i, j)).masked_fill(~seen, -torch.inf)
    return (torch.softmax(s, -1).nan_to_num() @ v).transpose(1, 2)


def qkv(S=40, H=2, D=16, B=1, Sk=None):
    g = torch.Generator().manual_seed(S)
    return tuple(torch.randn(B, n, H, D, generator=g) for n in (S, Sk or S, Sk or S))


def check(q, k, v, want, **options):
    for backend in ("triton", "reference"):
        got = attention(q, k, v, backend=backend, **options)
        assert (got.double() - want).abs().max() <= 5e-6, backend


@pytest.mark.parametrize("window", [2**31 - 1, 2**31 - 40, 10**10, 2**63 - 1, 40, 39])
@pytest.mark.parametrize("causal", [True, False])
def test_windows_as_wide_as_numbers_go(window, causal):
    leaves = [x.requires_grad_() for x in qkv(40, Sk=50)]
    exact = [x.detach().requires_grad_() for x in leaves]
    out = attention(*leaves, causal=causal, window=window, backend="triton")
    want = truth(*exact, causal=causal, window=window)
    g = torch.randn(out.shape)
    for a, b in zip(torch.autograd.grad(out, leaves, g), torch.autograd.grad(want, exact, g.double()), strict=True):
        assert (a - b).abs().max() <= 5e-6
    assert (out - want).abs().max() <= 5e-6


POSITIONS = torch.arange(40) * 10**9
REALS = torch.arange(40, dtype=torch.float64) + 2.0**30
WIDE = {
    "hash": lambda b, h, i, j: ((i * 1103515245 + j * 12345) % 1000003) % 10 < 5,
    "flat index": lambda b, h, i, j: (i.long() * 2**26 + j) >= (j.long() * 2**26 + i),
    "literal": lambda b, h, i, j: (i.long() * 2**33) >= (j.long() * 2**33),
    "int64 table": lambda b, h, i, j: (POSITIONS[i] - POSITIONS[j] < 3 * 10**9) & (POSITIONS[i].long() >= POSITIONS[j]),
    "fp64 table": lambda b, h, i, j: REALS[i] >= REALS[j],
    "shifts": lambda b, h, i, j: ((i << 27) >> 25) >= (j << 2),
}


@pytest.mark.parametrize("name", WIDE)
def test_integers_and_reals_as_wide_as_the_function_has_them(name):
    q, k, v = qkv()
    check(q, k, v, truth(q, k, v, mask=WIDE[name]), mask_mod=WIDE[name])


@pytest.mark.slow
@pytest.mark.parametrize("what", ["mask", "rope", "hook"])
def test_tensors_beyond_2_to_the_31_elements(what):
    """Two gigabytes, hardly a page of which is touched; in a process of its own: what wrapped was a crash."""
    code = f"""
import torch
from kernels_interpreter import interpreter
from trainkit.kernels import attention, rope
with interpreter():
    if {what!r} == "mask":
        store = torch.zeros(2**31 + 64, dtype=torch.bool)
        table = store.as_strided((3, 4, 4), (2**30, 4, 1))
        table[:] = torch.eye(4, dtype=torch.bool)
        v = torch.randn(3, 4, 1, 16)
        assert torch.equal(attention(v, v, v, mask_mod=lambda b, h, i, j: table[b, i, j], backend="triton"), v)
    else:
        store = torch.zeros(2**31 + 64, dtype=torch.float16)
        x = store.as_strided((1, 4, 3, 8), (0, 8, 2**30, 1))
        x[:] = torch.arange(96).view(1, 4, 3, 8)
        if {what!r} == "rope":
            got = rope(x, torch.zeros(4, 4), torch.ones(4, 4))
            assert torch.equal(got, torch.cat([-x[..., 4:], x[..., :4]], -1))
        else:
            mask = lambda b, h, i, j: i == j
            v = torch.randn(1, 4, 3, 8).half()
            got = attention(v, v, v, mask_mod=mask, output_mod=lambda y, p, b, h, i, d: y * 2.0, backend="triton")
            assert torch.equal(got, v * 2)
            attention(x, x, x, query_mod=lambda y, p, b, h, i, d: y * 2.0, backend="triton")
"""
    path = os.pathsep.join([os.path.dirname(sys.modules["kernels_interpreter"].__file__), *sys.path])
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


def test_more_batch_entries_than_a_grid_has_rows():
    """A launch has one dimension: the others end at 65,535."""
    from trainkit.kernels._grid import flat

    assert flat((1, 2, 70_000)) == (140_000,)
    with pytest.raises(ValueError, match=r"at most 2147483647 programs, got 2147483648"):
        flat((1 << 16, 1 << 15))
    q, k, v = qkv(3, B=5, H=3)
    for options in ({}, {"mask_mod": lambda b, h, i, j: (i >= j) | (h == b)}):
        check(q, k, v, truth(q, k, v, mask=options.get("mask_mod")), **options)


class Settings:
    width = 4


def test_values_that_cannot_be_seen_are_asked_for_anew():
    q, k, v = qkv()
    module, table = types.ModuleType("settings"), {"scale": 1.0}
    get = table.get
    by_class = lambda b, h, i, j: i - j < Settings.width  # noqa: E731
    by_module = lambda s, b, h, i, j: s * module.scale  # noqa: E731
    by_method = lambda s, b, h, i, j: s * get("scale")  # noqa: E731
    for width, scale in ((4, 1.0), (20, 3.0)):
        Settings.width, module.scale, table["scale"] = width, scale, scale
        check(q, k, v, truth(q, k, v, mask=lambda b, h, i, j, w=width: i - j < w), mask_mod=by_class)
        for function in (by_module, by_method):
            check(q, k, v, truth(q, k, v, score=lambda s, b, h, i, j, c=scale: s * c), score_mod=function)


CHANGES = {
    "copy_": lambda x, y: x.copy_(y),
    ".data =": lambda x, y: setattr(x, "data", y.clone()),
    ".data.copy_": lambda x, y: x.data.copy_(y),
    "numpy": lambda x, y: x.numpy().__setitem__(slice(None), y.numpy()),
    "set_": lambda x, y: x.set_(y.clone()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tables_that_changed_in_any_way_are_read_anew(name):
    q, k, v = qkv()
    table, cu = torch.arange(40) // 8, torch.tensor([0, 10, 40], dtype=torch.int32)
    mask = lambda b, h, i, j: table[i] == table[j]  # noqa: E731
    for step in (8, 20):
        CHANGES[name](table, torch.arange(40) // step)
        check(q, k, v, truth(q, k, v, mask=lambda b, h, i, j, n=step: i // n == j // n), mask_mod=mask)
        CHANGES[name](cu, torch.tensor([0, step, 40], dtype=torch.int32))
        want = truth(q, k, v, mask=lambda b, h, i, j, n=step: (i < n) == (j < n))
        check(q, k, v, want, cu_seqlens=cu)


def test_what_functions_captured_is_not_kept_alive():
    q, k, v = (x.requires_grad_() for x in qkv())
    seen = []
    for _ in range(5):
        bias, mask = torch.randn(2, 40, 40, requires_grad=True) * 1.0, torch.rand(40, 40) > 0.3
        seen += [weakref.ref(bias), weakref.ref(mask)]
        out = attention(
            q, k, v, score_mod=lambda s, b, h, i, j, t=bias: s + t[h, i, j], mask_mod=lambda b, h, i, j, t=mask: t[i, j],
            backend="triton",
        )  # fmt: skip
        out.sum().backward()
    del bias, mask, out
    gc.collect()
    assert not any(ref() is not None for ref in seen)


def test_a_cache_is_bounded_weak_and_one_for_all_threads():
    cache = Cache(3, most_bytes=10)
    objects = [torch.zeros(1) for _ in range(4)]
    for n, x in enumerate(objects):
        assert cache.get(n, lambda n=n: n, (x,), lambda _: 4) == n
    assert len(cache) == 2 and cache.nbytes == 8
    assert cache.get(3, lambda: "made anew", (objects[3],)) == 3
    assert cache.get(3, lambda: "of another", (objects[0],)) == "of another"
    del objects[2], x
    gc.collect()
    assert len(cache) == 1
    assert cache.get(None, lambda: 7) == 7 and len(cache) == 1


def test_functions_are_printed_once_by_threads_that_share_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(_codegen, "_folder", lambda: tmp_path)
    monkeypatch.setattr(os, "getpid", lambda: 7)  # as in containers that share a folder
    errors = []
    for n in range(10):
        text, gate = f"# {n}\nx = {n}\n" * 50, threading.Barrier(8)

        def work(text=text, gate=gate):
            gate.wait()
            try:
                _codegen._load(text)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
    assert not errors and len(list(tmp_path.iterdir())) == 10 + (tmp_path / "__pycache__").exists()


def test_nobody_knows_where_home_is(monkeypatch):
    def home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(_codegen.Path, "home", home)
    assert _codegen._folder().is_dir()


CONSTANT = {
    "False": (lambda b, h, i, j: torch.full_like(i, False, dtype=torch.bool), False),
    "True": (lambda b, h, i, j: True, True),
    "noop_mask": (noop_mask, True),
    "zeros": (lambda b, h, i, j: torch.zeros_like(i, dtype=torch.bool), False),
}


@pytest.mark.parametrize("name", CONSTANT)
def test_masks_that_are_constants(name):
    mask, value = CONSTANT[name]
    q, k, v = qkv()
    check(q, k, v, truth(q, k, v, mask=lambda b, h, i, j: (i == i) if value else (i != i)), mask_mod=mask)


TABLE = torch.linspace(-1, 1, 80).view(2, 40)
PREFIX = torch.tensor([7])


def morton(i):
    """Every second bit of an index, together: the column of a Morton order."""
    i = i & 0x55555555
    i = (i | (i >> 1)) & 0x33333333
    i = (i | (i >> 2)) & 0x0F0F0F0F
    return (i | (i >> 4)) & 0x00FF00FF


MASKS = {
    "and_masks": and_masks(lambda b, h, i, j: i >= j, lambda b, h, i, j: i - j < 7),
    "or_masks": or_masks(lambda b, h, i, j: i >= j, lambda b, h, i, j: j < PREFIX[b]),
    "global window": or_masks(lambda b, h, i, j: (i - j).abs() <= 3, lambda b, h, i, j: (i < 2) | (j < 2)),
    "neighbours in a Morton order": lambda b, h, i, j: (
        ((morton(i).clamp(2, 5) - morton(j)).abs() <= 2) & ((morton(i >> 1) - morton(j >> 1)).abs() <= 2)
    ),
    "inverted": lambda b, h, i, j: ~(i < j) & (~i >= -40),
}
SCORES = {
    "masked_fill": lambda s, b, h, i, j: s.masked_fill(i < j, -float("inf")),
    "softplus": lambda s, b, h, i, j: torch.nn.functional.softplus(s),
    "powers": lambda s, b, h, i, j: s * 2.0 ** (-h.float()) + s.abs() ** 2.5 + s**5 + (-1.0) ** (i - j) * 2**h,
    "log1p": lambda s, b, h, i, j: s - torch.log1p((i - j).abs().float()) + torch.log1p(s * s * 1e-4),
    "nan_to_num": lambda s, b, h, i, j: torch.nan_to_num(s / torch.where(i == j, 1.0, 2.0), 3.0),
    "floor of integers": lambda s, b, h, i, j: s + torch.floor(i - j) * 0.1 + (i >> 2).ceil(),
    "transposed table": lambda s, b, h, i, j: s + TABLE.t()[j, h] + TABLE.t()[3][h],
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_as_others_write_them(name):
    q, k, v = qkv()
    check(q, k, v, truth(q, k, v, mask=MASKS[name]), mask_mod=MASKS[name])


@pytest.mark.parametrize("name", SCORES)
def test_scores_as_others_write_them(name):
    leaves = [x.requires_grad_() for x in qkv()]
    exact = [x.detach().double().requires_grad_() for x in leaves]
    want = truth(*exact, score=SCORES[name])
    g = torch.randn(want.shape, generator=torch.Generator().manual_seed(0))
    wants = torch.autograd.grad(want, exact, g.double())
    got = attention(*leaves, score_mod=SCORES[name], backend="triton")
    assert (got - want).abs().max() <= 1e-5
    # Fifth powers make scores of 1000, whose log-sum-exp backward reads in fp32: to 6e-5.
    for a, b in zip(torch.autograd.grad(got, leaves, g), wants, strict=True):
        assert (a - b).abs().max() <= (1e-4 if name == "powers" else 2e-5) * max(1, b.abs().max())


def test_a_detached_table_or_score_gets_no_gradient():
    q, k, v = (x.requires_grad_() for x in qkv())
    table = torch.zeros(40, requires_grad=True)
    out = attention(q, k, v, score_mod=lambda s, b, h, i, j: s.detach() + table.detach()[i], backend="triton")
    grads = torch.autograd.grad(out.sum(), (q, table), allow_unused=True)
    assert (grads[0] == 0).all() and grads[1] is None


def second(f, *args):
    args = [x.clone().requires_grad_() for x in args]
    y = f(*(x**2 for x in args))
    g = torch.autograd.grad(y, args, torch.ones_like(y), create_graph=True)
    return torch.autograd.grad(sum((x**2).sum() for x in g), args)


TWICE = {
    "rms_norm": (rms_norm, (5, 8), (8,)),
    "swiglu": (swiglu, (5, 8), (5, 8)),
    "linear_cross_entropy": (
        lambda x, w: linear_cross_entropy(x, w, torch.zeros(5, dtype=torch.int64)),
        (5, 8),
        (11, 8),
    ),
    "attention": (lambda q, k, v: attention(q, k, v, backend="triton"), *[(1, 9, 2, 16)] * 3),
}


@pytest.mark.parametrize("name", TWICE)
def test_second_derivatives_are_refused_by_name(name):
    f, *shapes = TWICE[name]
    with pytest.raises(RuntimeError, match=f"{name} has a kernel for its gradient and none for the gradient's own"):
        second(f, *(torch.randn(s) for s in shapes))


def test_rope_has_second_derivatives():
    x, cos, sin = torch.randn(1, 4, 2, 8), torch.randn(4, 4), torch.randn(4, 4)

    def plain(x):
        low, high = x.chunk(2, -1)
        c, s = cos[:, None], sin[:, None]
        return torch.cat([low * c - high * s, high * c + low * s], -1)

    torch.testing.assert_close(second(lambda x: rope(x, cos, sin), x), second(plain, x))


def test_numbers_that_are_tensors():
    q, k, v = qkv()
    for name in ("scale", "softcap", "dropout_p"):
        with pytest.raises(ValueError, match=f"{name} must be a number, got a tensor.*learn it in a score_mod"):
            attention(q, k, v, **{name: torch.tensor(0.7, requires_grad=True)})
    want = attention(q, k, v, scale=0.5, softcap=3.0, backend="triton")
    got = attention(q, k, v, scale=torch.tensor(0.5), softcap=torch.tensor(3.0), backend="triton")
    assert torch.equal(got, want)


@pytest.mark.parametrize("backend", ["triton", "reference", "auto"])
def test_autocast_casts_as_pytorch_does_and_keeps_lse_in_fp32(backend):
    q, k, v = qkv()
    want = truth(*(x.bfloat16() for x in (q, k, v)), causal=True, window=5)
    for given in (v, v.bfloat16()):
        with torch.autocast("cpu", torch.bfloat16):
            out, lse = attention(q, k, given, causal=True, window=5, backend=backend, return_lse=True)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert (out - want).abs().max() <= 2e-2


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_tensors_made_in_inference_mode(backend):
    q, k, v = (x.requires_grad_() for x in qkv())
    with torch.inference_mode():
        table, cu = torch.arange(40) // 8, torch.tensor([0, 10, 40], dtype=torch.int32)
        mask = lambda b, h, i, j: table[i] == table[j]  # noqa: E731
        attention(q, k, v, mask_mod=mask, backend=backend)
        attention(q, k, v, cu_seqlens=cu, backend=backend)
    out = attention(q, k, v, mask_mod=mask, backend=backend)
    out.sum().backward()
    assert (out - truth(q, k, v, mask=lambda b, h, i, j: i // 8 == j // 8)).abs().max() <= 5e-6


def test_transforms_of_functions_take_plain_pytorch_or_say_so():
    q, k, v = qkv()
    grad = torch.func.grad(lambda q: attention(q, k, v).sum())(q)
    leaf = q.clone().requires_grad_()
    torch.testing.assert_close(grad, torch.autograd.grad(truth(leaf, k, v).sum(), leaf)[0].float(), atol=1e-5, rtol=0)
    torch.func.grad(lambda x: rms_norm(x, torch.ones(8)).sum())(torch.randn(2, 8))
    with pytest.raises(ValueError, match=r"backend='triton' cannot serve.*torch\.func"):
        torch.func.grad(lambda q: attention(q, k, v, backend="triton").sum())(q)


def test_compiled_graphs_on_the_cpu_have_the_plain_formulas():
    x, up = torch.randn(4, 8), torch.randn(4, 8)
    q, cos, sin = torch.randn(1, 4, 2, 8), torch.randn(4, 4), torch.randn(4, 4)
    functions = {
        "rms_norm": lambda: rms_norm(x, torch.ones(8)),
        "swiglu": lambda: swiglu(x, up),
        "rope": lambda: rope(q, cos, sin),
        "loss": lambda: linear_cross_entropy(x, up, torch.zeros(4, dtype=torch.int64)),
        "hook": lambda: attention(q, q, q, query_mod=lambda x, p, b, h, i, d: x * cos[i, d % 4]),
    }
    for name, function in functions.items():
        torch._dynamo.reset()
        got = torch.compile(function, fullgraph=True, backend="aot_eager")()
        torch.testing.assert_close(got, function(), atol=1e-5, rtol=1e-5, msg=name)


def test_rope_of_packed_sequences_whose_lengths_lie_elsewhere():
    """Lengths are read where they are, and used where q is."""
    q = torch.randn(1, 6, 2, 8)
    tables = torch.randn(6, 4), torch.randn(6, 4)
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    parts = [attention(q[:, a:b], q[:, a:b], q[:, a:b], rope=tables, causal=True) for a, b in ((0, 2), (2, 6))]
    got = attention(q, q, q, rope=tables, causal=True, cu_seqlens=cu)
    torch.testing.assert_close(got, torch.cat(parts, 1), atol=1e-5, rtol=1e-5)
    packed = Packed(from_host([0, 2, 6], q.device), cu, (0, 2, 6), (0, 2, 6))
    assert torch.equal(packed.cu_q, cu)
