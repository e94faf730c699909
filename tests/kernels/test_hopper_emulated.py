"""The Hopper kernels' own source, run on the CPU in random order of events, against the reference: see `kernels_gluon.py`."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

import kernels_gluon
from kernels_cases import LAYOUTS, filled
from kernels_interpreter import interpreter

from trainkit.kernels._attention import _block_lists, _hooks, _hopper
from trainkit.kernels._attention._call import Call
from trainkit.kernels._attention._packed import make_packed
from trainkit.kernels._attention._reference import reference
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._variant import build
from trainkit.kernels._cache import Cache

DOC = torch.arange(512) // 70
BIAS = torch.linspace(-2, 2, 2 * 64).view(2, 64)
EMPTY = [0, 20, 130, 250, 300], [0, 0, 150, 340, 350]
"""Ends of packed sequences of queries and of keys, the first without keys."""


def striped(b, h, q, k):
    """Tiles of whole blocks and others, but for one of whole blocks alone."""
    return ((q // 128 + k // 128) % 3 > 0) | (((q + k) % 5 == 0) & (q // 128 != 2))


# Widths of keys and values, queries, keys, and what is asked for; `three` takes the tiles of long sequences.
FORWARD = {
    "one": (128, 128, 1, 1, {"causal": True}),
    "full": (64, 64, 130, 300, {}),
    "causal": (128, 128, 300, 300, {"causal": True}),
    "three warpgroups": (64, 64, 400, 400, {"causal": True, "three": True}),
    "rows without keys": (256, 256, 300, 40, {"causal": True}),
    "narrow values": (128, 64, 200, 300, {"causal": True}),
    "wide values": (64, 256, 200, 150, {}),
    "window": (128, 128, 300, 420, {"window": 70, "dtype": torch.float16}),
    "causal window, tiles without keys": (64, 64, 420, 150, {"window": 70, "causal": True}),
    "soft cap": (64, 64, 257, 300, {"softcap": 20.0, "three": True}),
    "sinks and ALiBi": (64, 64, 200, 100, {"sinks": torch.tensor([-1.0, 3.0]), "alibi_slopes": torch.tensor([0.5, 0.1])}),
    "documents": (64, 64, 300, 300, {"mask_mod": lambda b, h, q, k: (DOC[q] == DOC[k]) & (q >= k)}),
    "documents, evaluated": (64, 64, 300, 300, {"mask_mod": lambda b, h, q, k: (DOC[q] == DOC[k]) & (q >= k), "evaluated": True}),
    "documents, causal": (128, 128, 333, 420, {"mask_mod": lambda b, h, q, k: DOC[q] == DOC[k], "causal": True}),
    "documents by batch, wide": (256, 256, 150, 200, {"mask_mod": lambda b, h, q, k: DOC[q + 30 * b] == DOC[k], "batch": 2}),
    "mask by head, window": (64, 64, 200, 300, {"mask_mod": lambda b, h, q, k: (k - h) % 5 > h, "window": 90, "heads": (4, 2)}),
    "mask by batch and head, score": (64, 128, 150, 290, {"mask_mod": lambda b, h, q, k: (q * k) % 7 > 2 * b + h, "batch": 2,
        "score_mod": lambda s, b, h, q, k: s + BIAS[h, (q - k) % 64]}),
    "whole blocks and others": (64, 64, 512, 512, {"mask_mod": striped}),
    "mask that sees nothing": (64, 64, 300, 300, {"mask_mod": lambda b, h, q, k: k < q - 200}),
    "score": (64, 64, 100, 300, {"score_mod": lambda s, b, h, q, k: s + BIAS[h, (q - k) % 64] * torch.tanh(s / 5)}),
    "packed": (128, 128, 300, 350, {"cu": EMPTY, "causal": True}),
    "packed, mask": (64, 64, 300, 350, {"cu": EMPTY, "mask_mod": lambda b, h, q, k: (q + k) % 3 > 0}),
    "RoPE": (64, 64, 200, 300, {"rope": True, "causal": True}),
    "RoPE, packed": (128, 128, 300, 350, {"rope": True, "cu": ([0, 20, 130, 300], [0, 20, 150, 350]), "causal": True}),
}  # fmt: skip
BACKWARD = {
    "causal": (64, 64, 200, 200, {"causal": True}),
    "late dQ": (128, 128, 150, 200, {"window": 70}),
    "deterministic": (128, 64, 130, 200, {"causal": True, "deterministic": True}),
    "two passes": (256, 256, 100, 150, {"causal": True}),
    "documents": (64, 64, 200, 200, {"mask_mod": lambda b, h, q, k: (DOC[q] == DOC[k]) & (q >= k)}),
    "packed": (64, 64, 300, 350, {"cu": EMPTY, "causal": True}),
    "deterministic, documents by batch and head": (64, 64, 150, 200, {"deterministic": True, "causal": True, "batch": 2,
        "mask_mod": lambda b, h, q, k: DOC[q + 9 * h] == DOC[k + 30 * b], "heads": (4, 2)}),
}  # fmt: skip


def setup(case, seed):
    D, DV, Sq, Sk, options = case
    options = dict(options)
    dtype, cu = options.pop("dtype", torch.bfloat16), options.pop("cu", None)
    how = {name for name in ("three", "evaluated") if options.pop(name, False)}
    rope, batch, heads = options.pop("rope", False), options.pop("batch", 1), options.pop("heads", (2, 1))
    g = torch.Generator().manual_seed(seed)
    shapes = (batch, Sq, heads[0], D), (batch, Sk, heads[1], D), (batch, Sk, heads[1], DV)
    q, k, v = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    cu = None if cu is None else tuple(torch.tensor(x, dtype=torch.int32) for x in cu)
    packed = make_packed(cu, q, k)
    angles = torch.arange(Sk)[:, None] / 100.0 ** (torch.arange(D // 2) / (D // 2))
    tables = (angles.cos(), angles.sin()) if rope else None
    spec = Spec(scale=D**-0.5, **options)
    call = Call(spec, packed, build(spec, torch.device("cpu")), True, tables)
    turned = q
    if rope:
        cu_q, cu_k = cu or (None, None)
        turned = _hooks.rope_formula(q, tables, _hooks.rope_offset(q, k, cu_q, cu_k), cu_q)
    return (q, k, v), turned, call, how


def forward(case, seed):
    (q, k, v), turned, call, how = setup(case, seed)
    with interpreter(), pytest.MonkeyPatch.context() as patch:
        if "evaluated" in how:
            patch.setattr(_block_lists, "LARGEST", 0)
            patch.setattr(_block_lists, "KEPT", Cache(99))
        if "three" in how:
            # Not what other calls of this form take.
            patch.setattr(_hopper, "PLANS", Cache(99))
            patch.setattr(_hopper, "_seen", lambda *_: 1e9)
        out, lse = _hopper.forward(q, k, v, call.spec.sinks, call, kernels_gluon.launcher(seed, programs=1 + seed % 3))
    want, want_lse = reference(turned.float(), k.float(), v.float(), call.spec, call.packed)
    assert torch.equal(lse.isfinite(), want_lse.isfinite())
    assert (out - want).abs().max() <= 2e-2
    assert (lse - want_lse)[lse.isfinite()].abs().max() <= 1e-3


def backward(case, seed):
    (q, k, v), _, call, _ = setup(case, seed)
    leaves = [x.float().requires_grad_() for x in (q, k, v)]
    out, lse = reference(*leaves, call.spec, call.packed)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).bfloat16()
    wants = torch.autograd.grad(out, leaves, grad.float())
    delta = (out.detach() * grad.float()).sum(-1).transpose(1, 2).contiguous()
    with interpreter(), pytest.MonkeyPatch.context() as patch:
        # However short.
        patch.setattr(_hopper, "_pooled", lambda *_: True)
        launch = kernels_gluon.launcher(seed, programs=1 + seed % 3, resident=1 + seed % 4)
        grads = _hopper.backward(q, k, v, lse.detach().contiguous(), grad, delta, call, launch)
    for got, want in zip(grads, wants, strict=True):
        assert (got - want).abs().max() <= 2e-2 * want.abs().max()


@pytest.mark.parametrize("name", FORWARD)
def test_forward(name):
    forward(FORWARD[name], 1)


@pytest.mark.parametrize("name", BACKWARD)
def test_backward(name):
    backward(BACKWARD[name], 1)


@pytest.mark.parametrize("seed", range(1, 4))
def test_more_heads_than_dq_has_room_for(seed, monkeypatch):
    """Two or three programs sum dQ of seven heads in three slots."""
    monkeypatch.setattr(_hopper, "PLANS", Cache(99))
    monkeypatch.setattr(_hopper, "_processors", lambda _: 2)
    backward((64, 64, 130, 140, {"causal": True, "heads": (7, 7)}), seed)
    q = torch.empty(1, 130, 7, 64)
    assert _hopper._pool(q, q, 2, Call(Spec(scale=1.0), None, None, True)).slots == 3


def test_exponentials_without_the_special_function_unit():
    exp2 = kernels_gluon.module(kernels_gluon.source_of("trainkit.kernels._attention._elementwise_gluon"))[
        "exp2_polynomial"
    ]
    x = torch.linspace(-1, 1, 1_000_001)
    for factor in (1.0, 87.0):
        want = torch.exp2(x.double() * factor)
        got = torch.from_numpy(exp2(kernels_gluon.tensor(x.numpy()), factor))
        assert ((got - want) / want).abs().max() <= 2**-9.15
    assert math.isnan(exp2(kernels_gluon.tensor([float("nan")]), 1.0)[0])


@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("side", ["q", "k", "v", "grad", "all"])
def test_layouts(layout, side):
    """In place or by a copy; the second time by the plan of the first."""
    for seed in (1, 2):
        (q, k, v), _, call, _ = setup((64, 64, 30, 20, {"causal": True}), seed)
        tensors = {
            "q": q,
            "k": k,
            "v": v,
            "grad": torch.randn(q.shape, generator=torch.Generator().manual_seed(9)).bfloat16(),
        }
        leaves = [x.float().requires_grad_() for x in (q, k, v)]
        out, lse = reference(*leaves, call.spec, None)
        wants = torch.autograd.grad(out, leaves, tensors["grad"].float())
        delta = (out.detach() * tensors["grad"].float()).sum(-1).transpose(1, 2).contiguous()
        q, k, v, grad = (
            filled(x.shape, 0, x.dtype, layout if side in (name, "all") else "dense").copy_(x)
            for name, x in tensors.items()
        )
        with interpreter():
            launch = kernels_gluon.launcher(seed)
            assert (_hopper.forward(q, k, v, None, call, launch)[0] - out).abs().max() <= 2e-2
            grads = _hopper.backward(q, k, v, lse.detach().contiguous(), grad, delta, call, launch)
        for got, want in zip(grads, wants, strict=True):
            assert (got - want).abs().max() <= 2e-2 * want.abs().max()


def rows(seed, vocabulary=8224):
    """Loss and gradient of rows kept in shared memory; the third target does not count, the last is no token."""
    from trainkit.kernels.fused._loss_hopper import cross_entropy

    logits = (torch.randn(5, vocabulary, generator=torch.Generator().manual_seed(seed)) * 4).bfloat16()
    target = torch.tensor([0, vocabulary - 1, -100, 4096, vocabulary])
    leaf = logits.float().requires_grad_()
    wants = torch.nn.functional.cross_entropy(leaf[:4], target[:4], reduction="none")
    wants.sum().backward()
    losses = torch.full((5,), float("nan"))
    launch = kernels_gluon.launcher(seed)(cross_entropy, (5,))
    with interpreter():
        launch(logits, target, losses, vocabulary, -100, 1.0, 4096, -(-vocabulary // 4096), 8)
    assert losses[4].isnan() and (losses[:4] - wants).abs().max() <= 1e-4
    assert (logits[:4] - leaf.grad[:4]).abs().max() <= 2e-3 and (logits[2] == 0).all()


def test_rows_of_a_loss(monkeypatch):
    rows(1)
    rows(2, vocabulary=8192)
    path = kernels_gluon.source_of("trainkit.kernels.fused._loss_hopper")
    text = Path(path).read_text()
    for right, wrong in {
        "wait_group(BLOCKS - 1 - i)": "wait_group(BLOCKS - i)",
        "mask=at < V)": "mask=at <= V)",
    }.items():
        assert right in text
        monkeypatch.setattr(kernels_gluon, "module", kernels_gluon.changed(path, text.replace(right, wrong)))
        with pytest.raises((AssertionError, IndexError)):
            rows(1)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_other_orders(seed):
    for case in FORWARD.values():
        forward(case, seed)
    for case in BACKWARD.values():
        backward(case, seed)


def plant(monkeypatch, file, right, wrong):
    """Put a mistake into a file of the kernels."""
    path = kernels_gluon.source_of(f"trainkit.kernels._attention.{file}")
    text = Path(path).read_text()
    assert text.count(right) == 1
    monkeypatch.setattr(kernels_gluon, "module", kernels_gluon.changed(path, text.replace(right, wrong)))


WRONG = {
    "values given back too early": (
        "        acc, even, odd = warpgroup_mma_wait(0, deps=[acc, even, odd])\n        mbarrier.arrive(bars.v_free.index(t))",
        "        mbarrier.arrive(bars.v_free.index(t))\n        acc, even, odd = warpgroup_mma_wait(0, deps=[acc, even, odd])",
    ),
    "queries never given back": ("        if c.QS == 2:\n            mbarrier.arrive(bars.q_free.index(slot))", ""),
    "output stage not waited for": ("    tma.store_wait(0)\n    gl.thread_barrier()\n    stage.store", "    stage.store"),
    "tile without keys forgotten": ("count = gl.maximum(count, 1)", "count = count"),
    "diagonal one off": ("end = (at + 1)[", "end = (at + 2)["),
    "rows of the next head": ("gl.convert_layout(lse, RO), mask=offsets < place.Sq)", "gl.convert_layout(lse, RO))"),
}  # fmt: skip


WRONG_BACKWARD = {
    "keys not waited for": ("_hopper_backward_keys_producer", "    mbarrier.wait(bars.kv_free.index(0), (kept & 1) ^ 1)\n", ""),
    "results written over sums on their way": (
        "_hopper_tiles", "        tma.store_wait(0)\n        gl.thread_barrier()\n        buffer", "        buffer"
    ),
    "sums converted before they are complete": ("_hopper_dq_pool", "volatile=True) < 2 * tiles", "volatile=True) < tiles"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_BACKWARD)
def test_a_wrong_backward_is_found(name, monkeypatch):
    plant(monkeypatch, *WRONG_BACKWARD[name])
    monkeypatch.setattr(_hopper, "PLANS", Cache(99))
    monkeypatch.setattr(_hopper, "_processors", lambda _: 2)
    with pytest.raises((AssertionError, IndexError, ValueError)):
        for seed in range(8):
            backward((128, 128, 130, 140, {"causal": True, "heads": (7, 7)}), seed)


WRONG_BITS = {
    "a first block that is whole takes the bits of another": (
        "gl.where(full < count, before + count, 0)",
        "before + count",
    ),
    "the last whole block takes bits": ("gl.minimum(full + 1, count)", "full"),
    "both warpgroups take the first's": ("64 * W + gl.arange", "gl.arange"),
    "blocks in the list's order": ("gl.where(n == 0, count, n) - 1", "n"),
    "neighbours exchanged": ("+ pair[None, None, None, :])", "+ 1 - pair[None, None, None, :])"),
}


@pytest.mark.parametrize("name", WRONG_BITS)
def test_wrong_bits_are_found(name, monkeypatch):
    plant(monkeypatch, "_hopper_bits", *WRONG_BITS[name])
    with pytest.raises((AssertionError, IndexError)):
        for seed in range(2):
            forward((64, 64, 512, 512, {"mask_mod": striped}), seed)


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_kernel_is_found(name, monkeypatch):
    """What this file's other tests are worth: each of these mistakes is one that the source could have."""
    plant(monkeypatch, "_hopper_softmax" if "diagonal" in name else "_hopper_forward", *WRONG[name])
    with pytest.raises((AssertionError, IndexError, ValueError)):
        for seed in range(6):
            forward((64, 64, 420, 150, {"causal": True}), seed)
            forward((128, 128, 200, 700, {}), seed)
