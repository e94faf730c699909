"""What the kernels' tests share: inputs, layouts, and a check on the GPU against fp64.

The allowed error is what a plain 16-bit implementation gets wrong.
"""

import pytest
import torch

from trainkit.kernels import attention


def available(path):
    if path == "hopper" and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")


def inputs(B, Sq, Sk, Hq, Hkv, D, DV, dtype):
    g = torch.Generator("cuda").manual_seed(Sq * 1000 + D)
    shapes = (B, Sq, Hq, D), (B, Sk, Hkv, D), (B, Sk, Hkv, DV)
    return [torch.randn(s, generator=g, device="cuda", dtype=torch.float32).to(dtype) for s in shapes]


def plain(q, k, v, sinks, options):
    """The textbook in 16 bits: rounded after each matmul and after the softmax."""
    group = q.shape[2] // k.shape[2]
    qt, kt, vt = q.transpose(1, 2), *(x.transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    s = (qt @ kt.mT * options.get("scale", q.shape[3] ** -0.5)).float()
    Sq, Sk = s.shape[2:]
    b, h, i, j = (
        torch.arange(n, device="cuda").view([-1 if d == x else 1 for x in range(4)]) for d, n in enumerate(s.shape)
    )
    p = i + Sk - Sq
    if "softcap" in options:
        s = options["softcap"] * torch.tanh(s / options["softcap"])
    if "alibi_slopes" in options:
        s = s - options["alibi_slopes"][None, :, None, None] * (p - j).abs()
    if "score_mod" in options:
        s = options["score_mod"](s, b, h, i, j)
    seen = torch.ones_like(s, dtype=torch.bool)
    if options.get("causal"):
        seen = seen & (j <= p)
    if "window" in options:
        seen = seen & ((p - j).abs() < options["window"])
    if "mask_mod" in options:
        seen = seen & options["mask_mod"](b, h, i, j)
    if "cu_seqlens" in options:
        cu = options["cu_seqlens"]
        doc = torch.bucketize(torch.arange(Sq, device="cuda"), cu[1:], right=True)
        seen = seen & (doc[:, None] == doc[None, :])
    s = s.masked_fill(~seen, -torch.inf)
    lse = torch.logsumexp(
        s if sinks is None else torch.cat([s, sinks.view(1, -1, 1, 1).expand(*s.shape[:3], 1)], -1), -1
    )
    lse = lse.masked_fill(~seen.any(-1), -torch.inf)
    weights = torch.exp(s - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).to(q.dtype)
    return (weights @ vt).transpose(1, 2), lse


def check(path, B, Sq, Sk, Hq, Hkv, D, DV=None, dtype=torch.bfloat16, **options):
    available(path)
    tensors = inputs(B, Sq, Sk, Hq, Hkv, D, DV or D, dtype)
    sinks = options.pop("sinks", None)
    grads = {}
    g = torch.randn(B, Sq, Hq, DV or D, device="cuda").to(dtype)
    dlse = torch.randn(B, Hq, Sq, device="cuda") * 0.1
    for kind in ("exact", "plain", "ours"):
        leaves = [(x.double() if kind == "exact" else x.clone()).requires_grad_() for x in tensors]
        s = None if sinks is None else sinks.to(torch.float64 if kind == "exact" else torch.float32).requires_grad_()
        if kind == "plain":
            out, lse = plain(*leaves, s, options)
        else:
            backend = path if kind == "ours" else "reference"
            out, lse = attention(*leaves, sinks=s, return_lse=True, backend=backend, **options)
        wanted = leaves if s is None else [*leaves, s]
        loss = (out.double() * g.double()).sum() + (torch.where(lse.isfinite(), lse, 0).double() * dlse.double()).sum()
        grads[kind] = [out.detach(), lse.detach(), *torch.autograd.grad(loss, wanted)]
    report = []
    names = "out", "lse", "dq", "dk", "dv", "dsinks"
    for name, ours, rough, exact in zip(names, *(grads[x] for x in ("ours", "plain", "exact")), strict=False):
        assert torch.equal(ours.isfinite(), exact.isfinite()), name
        fine = exact.isfinite()
        error, allowed = ((x.double() - exact)[fine].abs().max().item() if fine.any() else 0.0 for x in (ours, rough))
        report.append(f"{name} {error:.2e} of {allowed:.2e}")
        if name in ("lse", "dsinks"):
            slack = 1e-3
        else:
            # One query: the plain one's only rounding can fall on a representable number, ours still rounds once.
            slack = 1e-5 + 2**-8 * exact[fine].abs().max().item() * (Sq == 1)
        assert error <= (3 if name == "dq" else 2) * allowed + slack, report


def filled(shape, number, dtype, layout):
    """A tensor of one number, laid out in one of several ways."""
    B, S, H, D = shape
    if layout == "heads outside":
        x = torch.empty(B, H, S, D, dtype=dtype).transpose(1, 2)
    elif layout == "slice":
        x = torch.empty(B, S, 3 * H * D, dtype=dtype)[..., H * D : 2 * H * D].unflatten(2, (H, D))
    elif layout == "odd rows":
        x = torch.empty(B, S, H, D + 1, dtype=dtype)[..., :D]
    elif layout == "off by one":
        x = torch.empty(B * S * H * D + 8, dtype=dtype)[1:-7].view(shape)
    elif layout == "off in rows":
        x = torch.empty(B, S, H, D + 8, dtype=dtype)[..., 1 : D + 1]
    else:
        x = torch.empty(shape, dtype=dtype)
    return x.fill_(number)


LAYOUTS = ["dense", "heads outside", "slice", "odd rows", "off by one", "off in rows"]
