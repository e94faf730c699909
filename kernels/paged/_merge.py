"""`merge_states`: attention over several sets of keys, from attention over each (FlashInfer, arXiv 2501.01005, section 2.2)."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainkit.kernels._attention import _triton
from trainkit.kernels._attention._delta import padded
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._grid import flat
from trainkit.kernels._once import only_once

ROWS = 16
"""Rows of a program: with head_dim 128, a few cache lines a thread."""


def reference(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """The definition, in fp32 (fp64 for fp64 inputs), differentiable."""
    work = torch.promote_types(out.dtype, torch.float32)
    lse = lse.to(work)
    top = lse.detach().amax(0)
    finite = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(lse - finite)
    total = weights.sum(0)
    empty = total == 0.0
    whole = total.masked_fill(empty, 1.0)
    merged = (out.to(work) * (weights / whole)[..., None]).sum(0)
    return merged.to(out.dtype), (finite + torch.log(whole)).masked_fill(empty, -torch.inf)


State = tuple[Any, ...]


def state(out: Tensor, lse: Tensor, heads_first: bool = False) -> State:
    """A state as the kernels take it, of out `[N, H, D]` and lse `[N, H]` (or `[H, N]`)."""
    lr, lh = lse.stride()[::-1] if heads_first else lse.stride()
    return out, out.stride(0), out.stride(1), lse, lr, lh


def run(kernel: str, states: Sequence[State], *more: Any) -> None:
    """Launch over all rows of the first state; `more` are other states, and tuples of such."""
    from trainkit.kernels.paged import _merge_kernels

    out = states[0][0]
    n, H, D = out.shape
    if out.numel():
        grid = flat((-(-n // ROWS) * H,))
        getattr(_merge_kernels, kernel)[grid](tuple(states), *more, n, H, len(states), D, padded(D), ROWS)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, lse: Tensor) -> Any:
        merged, total = torch.empty_like(out[0]), torch.empty_like(lse[0], dtype=torch.float32)
        run("merge", [state(o, s) for o, s in zip(out, lse, strict=True)], state(merged, total))
        ctx.save_for_backward(out, lse, merged, total)
        ctx.set_materialize_grads(False)
        return merged, total

    @staticmethod
    @only_once("merge_states")
    def backward(ctx: Any, *grads: Any) -> Any:
        out, lse, merged, total = ctx.saved_tensors
        g = torch.zeros_like(merged) if grads[0] is None else grads[0].contiguous()
        gl = torch.zeros_like(total) if grads[1] is None else grads[1]
        d_out, d_lse = torch.empty_like(out), torch.empty_like(lse)
        pairs = [[state(o, s) for o, s in zip(a, b, strict=True)] for a, b in ((out, lse), (d_out, d_lse))]
        run("merge_backward", pairs[0], state(merged, total), state(g, gl), tuple(pairs[1]))
        return d_out, d_lse


def merge_states(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys.

    Args:
        out: `[S, N, H, D]`, the S sets' outputs; 0 where a set is empty.
        lse: `[S, N, H]`, natural log of their softmax denominators, fp32; -inf where a set is empty.

    Returns:
        out `[N, H, D]` and lse `[N, H]`, differentiable in both arguments; 0 and -inf where all sets are empty.

    Raises:
        ValueError: shapes that disagree.

    Example:
        >>> out, lse = merge_states(torch.stack([prefix_out, own_out]), torch.stack([prefix_lse, own_lse]))
    """
    if out.dim() != 4 or lse.shape != out.shape[:3] or out.shape[0] < 1:
        raise ValueError(f"merge_states takes out [S, N, H, D] and lse [S, N, H], got {list(out.shape)}, {list(lse.shape)}")
    if not out.is_floating_point() or not lse.is_floating_point():
        raise ValueError(f"merge_states takes floating-point states, got {out.dtype} and {lse.dtype}")
    like = out[:1, :1, :1]
    if out.dtype == torch.float64 or _triton.why_not(like, like, Spec(1.0)) is not None:
        return reference(out, lse)
    out = out if out.stride(-1) == 1 else out.contiguous()
    return _Merge.apply(out, lse)  # type: ignore[no-untyped-call, no-any-return]
