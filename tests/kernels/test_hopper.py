"""The Hopper kernels compile for sm_90 without a GPU: wgmma and TMA are there, nothing spills that should not."""

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed: pip install 'triton>=3.6'")

from paths import ROOT

from trainkit.kernels._attention import _block_lists, _hopper
from trainkit.kernels._attention._call import Call
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._variant import build
from trainkit.kernels._attention._views import matrix_view

SCRIPT = ROOT / "tests" / "support" / "kernels_cross_compile.py"


def compiled(*arguments):
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    run = subprocess.run(
        [sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=280, env=environment
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


def check(found, kernels, spills):
    assert len(found) == kernels
    for name, kernel in found.items():
        assert kernel["wgmma"] > 0 and kernel["tma"], name
        # As many waits as products: ptxas has given up overlapping them, and says so nowhere else.
        assert kernel["waits"] < kernel["wgmma"] / 2, (name, kernel)
        assert kernel["in loops"] <= spills, (name, kernel)
        assert kernel["shared"] <= 227 << 10, (name, kernel)


def test_forward():
    check(compiled("forward", 128, "causal"), 1, 0)


# Instructions of a loop of products that spill or reload, as the ptxas of Triton 3.6.0 leaves them; 0 is the aim. At a
# tile's start and end there are more (`python tests/support/kernels_cross_compile.py` counts them too).
@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "flags", "spills"),
    [
        (64, ("causal",), 0),
        (64, ("causal", "long"), 0),
        (64, ("long",), 0),
        (256, ("causal",), 0),
        (128, ("causal", "rope"), 0),
        (256, ("causal", "rope"), 0),
        (128, ("documents",), 16),
        (64, ("documents", "bits"), 0),
        (128, ("documents", "bits"), 0),
        (256, ("documents", "bits"), 0),
        (128, ("causal", "capped"), 0),
        (64, ("causal", "capped", "long"), 0),
    ],
)
def test_other_forwards(width, flags, spills):
    check(compiled("forward", width, *flags), 1, spills)


@pytest.mark.slow
@pytest.mark.parametrize(("width", "kernels", "spills"), [(64, 2, 0), (128, 2, 0), (256, 3, 8)])
def test_deterministic_backward(width, kernels, spills):
    check(compiled("backward", width, "causal", "deterministic"), kernels, spills)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("width", "flags", "spills"),
    [(64, ("causal",), 15), (128, ("causal",), 0), (64, ("documents", "bits"), 24), (128, ("documents", "bits"), 4)],
)
def test_fused_backward(width, flags, spills):
    check(compiled("backward", width, *flags), 1, spills)


def test_planes_describe_layouts_in_place():
    x = torch.zeros(2, 10, 4, 64, dtype=torch.bfloat16)
    assert matrix_view(x) == ((20, 256), 256, 10, 0, 64, False)
    heads_outside = x.transpose(1, 2).contiguous().transpose(1, 2)
    assert matrix_view(heads_outside) == ((80, 64), 64, 40, 10, 0, False)
    fused = torch.zeros(2, 10, 3 * 256, dtype=torch.bfloat16)[..., 256:512].unflatten(2, (4, 64))
    assert matrix_view(fused) == ((20, 256), 768, 10, 0, 64, False)
    odd = torch.zeros(2, 10, 4, 65, dtype=torch.bfloat16)[..., :64]
    assert matrix_view(odd) == ((20, 256), 256, 10, 0, 64, True)


def counts(mask, S, bm):
    """How many blocks of `bm` queries meet each tile of 128 keys, by looking at every pair."""
    at = torch.arange(S)
    seen = mask(None, None, at[:, None], at[None, :]).view(S // bm, bm, S // 128, 128)
    return seen.any(3).any(1).sum(0)


DOC = torch.arange(8192) // 300


@pytest.mark.parametrize(
    ("S", "D", "options", "pooled"),
    [
        (4096, 128, {"causal": True}, True),
        (512, 128, {"causal": True}, False),
        (256, 64, {"causal": True}, True),
        (4096, 128, {"causal": True, "window": 300}, False),
        (4096, 128, {"window": 2000}, True),
        (4096, 128, {"mask_mod": lambda b, h, q, k: q >= k}, True),
        (4096, 64, {"mask_mod": lambda b, h, q, k: q >= k}, True),
        (4096, 128, {"mask_mod": lambda b, h, q, k: (q >= k) & (DOC[q] == DOC[k])}, False),
        # A prompt of 512 tokens and seven leaves: few tiles are met by all, most by one leaf.
        (4096, 128, {"mask_mod": lambda b, h, q, k: (q >= k) & ((k < 512) | (q // 512 == k // 512))}, False),
    ],
)
def test_dq_is_summed_in_the_same_pass_where_queries_meet_many_keys(S, D, options, pooled, monkeypatch):
    q = torch.empty(1, S, 1, D, dtype=torch.bfloat16)
    spec = Spec(scale=1.0, **options)
    call = Call(spec, None, build(spec, torch.device("cpu")), True)
    bm = _hopper._passes(D, D, False)[0].queries
    if spec.mask_mod is not None:
        found = counts(spec.mask_mod, S, bm)
        monkeypatch.setattr(_block_lists, "lists", lambda _: _block_lists.Lists(found, found, found, 0, 0, 1))
    assert _hopper._pooled(q, q, call, bm) == pooled


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float32}, "float32"),
        ({"width": 96}, "head_dim 64, 128 and 256, got 96"),
        ({"sigmoid": True}, "sigmoid"),
        ({"dropout_p": 0.5}, "dropout"),
        ({"scale": -1.0}, "positive scale, got -1.0"),
    ],
)
def test_what_it_does_not_serve_is_said(options, reason):
    options = {"scale": 1.0} | options
    width, dtype = options.pop("width", 64), options.pop("dtype", torch.bfloat16)
    x = torch.zeros(1, 4, 2, width, dtype=dtype)
    assert reason in _hopper.unsupported(x, x, x, Spec(**options))
