"""The definition of attention, in plain PyTorch: slow, obvious, differentiable; the CPU path of every variant."""

import torch
from torch import Tensor

from trainkit.kernels._attention._dropout import keep_mask
from trainkit.kernels._attention._scalars import over_grid
from trainkit.kernels._attention._spec import Packed, Spec


def _visible(spec: Spec, p: Tensor, kv: Tensor) -> Tensor | None:
    gap = p - kv
    seen = gap >= 0 if spec.causal else None
    if spec.window is not None:
        near = gap.abs() < spec.window
        seen = near if seen is None else seen & near
    return seen


def _checked(name: str, x: object, shape: torch.Size) -> Tensor:
    if not isinstance(x, Tensor) or x.shape != shape:
        got = f"shape {list(x.shape[len(shape) :])}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must return one number for one element, got {got}")
    if name == "mask_mod" and x.dtype != torch.bool:
        raise ValueError(f"mask_mod must return booleans, got {x.dtype}: compare, do not count")
    return x


def _attend(q: Tensor, k: Tensor, v: Tensor, spec: Spec, first: int) -> tuple[Tensor, Tensor]:
    """`[B, H, S, D]` in the working precision, heads already repeated; `first` is the number of batch entry 0."""
    B, H, Sq, _ = q.shape
    Sk = k.shape[2]
    dev = q.device
    indices = tuple(torch.arange(i, i + n, device=dev) for i, n in ((first, B), (0, H), (0, Sq), (0, Sk)))
    b, h, qi, kv = (x.view([-1 if i == d else 1 for i in range(4)]) for d, x in enumerate(indices))
    p = qi + (Sk - Sq)

    s = q @ k.mT * spec.scale
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if spec.alibi_slopes is not None:
        slopes = spec.alibi_slopes.to(s.dtype)
        slopes = slopes[None, :] if slopes.dim() == 1 else slopes[first : first + B]
        s = s - slopes[:, :, None, None] * (p - kv).abs()
    if spec.score_mod is not None and s.numel():
        s = _checked("score_mod", over_grid(spec.score_mod, s, indices), s.shape).to(s.dtype)
    seen = _visible(spec, p, kv)
    if spec.mask_mod is not None and s.numel():
        extra = _checked("mask_mod", over_grid(spec.mask_mod, None, indices), s.shape)
        seen = extra if seen is None else seen & extra
    if seen is not None:
        s = s.masked_fill(~seen, -torch.inf)

    if spec.sigmoid:
        weights, lse = torch.sigmoid(s), s.new_zeros(B, H, Sq)
    else:
        # A maximum is a constant of the sum: its gradient cancels, and detaching it keeps -inf rows finite.
        top = s.detach().amax(-1) if Sk else s.new_full((B, H, Sq), -torch.inf)
        empty = top == -torch.inf
        sinks = None if spec.sinks is None else spec.sinks.to(s.dtype)[None, :, None]
        if sinks is not None:
            top = torch.maximum(top, sinks.detach())
        top = top.masked_fill(top == -torch.inf, 0.0)
        weights = torch.exp(s - top[..., None])
        total = weights.sum(-1)
        if sinks is not None:
            total = total + torch.exp(sinks - top)
        total = total.masked_fill(empty, 1.0)
        weights = weights / total[..., None]
        lse = (torch.log(total) + top).masked_fill(empty, -torch.inf)
    if spec.dropout_p > 0:
        keep = keep_mask(spec.seed, spec.dropout_p, b * H + h, qi, kv)
        weights = weights * keep / (1.0 - spec.dropout_p)
    return weights @ v, lse


def reference(q: Tensor, k: Tensor, v: Tensor, spec: Spec, packed: Packed | None = None) -> tuple[Tensor, Tensor]:
    """Attention with every variant, in fp32 (fp64 for fp64 inputs), O(Sq * Sk) memory.

    Args:
        q: `[B, Sq, Hq, D]`.
        k: `[B, Sk, Hkv, D]`.
        v: `[B, Sk, Hkv, Dv]`.

    Returns:
        out `[B, Sq, Hq, Dv]` in q's dtype; lse `[B, Hq, Sq]`, natural log, fp32 (fp64 for fp64 inputs): the log of the
        softmax's denominator, sinks included, and -inf in a row without keys.
    """
    work = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[2] // k.shape[2]
    qw = q.to(work).transpose(1, 2)
    kw, vw = (x.to(work).transpose(1, 2).repeat_interleave(group, 1) for x in (k, v))
    with torch.autocast(q.device.type, enabled=False):
        if packed is None:
            out, lse = _attend(qw, kw, vw, spec, 0)
        else:
            parts = []
            for i in range(len(packed.bounds_q) - 1):
                rows = slice(packed.bounds_q[i], packed.bounds_q[i + 1])
                cols = slice(packed.bounds_k[i], packed.bounds_k[i + 1])
                parts.append(_attend(qw[:, :, rows], kw[:, :, cols], vw[:, :, cols], spec, i))
            out, lse = (torch.cat(x, 2) for x in zip(*parts, strict=True))
    return out.transpose(1, 2).to(q.dtype), lse
