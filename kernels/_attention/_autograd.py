"""The kernels as one differentiable function: Hopper's where they serve, Triton's for the rest."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from trainkit.kernels._attention import _hooks, _hopper, _triton
from trainkit.kernels._attention._call import Call
from trainkit.kernels._attention._delta import row_delta, sink_gradient
from trainkit.kernels._attention._reference import reference
from trainkit.kernels._attention._spec import Packed, Spec
from trainkit.kernels._attention._variant import build
from trainkit.kernels._once import only_once


def run_forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """Compute out `[B, Sq, Hq, Dv]` and lse `[B, Hq, Sq]` by the call's kernels."""
    if q.is_cuda and q.get_device() != torch.cuda.current_device():
        # Kernels run on the current device.
        with torch.cuda.device(q.device):
            return run_forward(q, k, v, sinks, call)
    # The kernels read them without a stride.
    sinks = None if sinks is None else sinks.contiguous()
    return _hopper.forward(q, k, v, sinks, call) if call.hopper else _triton.forward(q, k, v, sinks, call)


def run_backward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, out: Tensor, lse: Tensor, grad: Tensor,
    grad_lse: Tensor | None, call: Call,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, list[Tensor]]:  # fmt: skip
    """Gradients of q, k, v, sinks and the captured tensors that learn."""
    if q.is_cuda and q.get_device() != torch.cuda.current_device():
        with torch.cuda.device(q.device):
            return run_backward(q, k, v, sinks, out, lse, grad, grad_lse, call)
    grad = grad if grad.stride(-1) == 1 else grad.contiguous()
    delta = row_delta(out, grad, grad_lse)
    tables: list[Tensor] = []
    if call.hopper and not call.variant.learned:
        dq, dk, dv = _hopper.backward(q, k, v, lse, grad, delta, call)
    else:
        dq, dk, dv, tables = _triton.backward(q, k, v, lse, grad, delta, call)
    return dq, dk, dv, None if sinks is None else sink_gradient(sinks, lse, delta), tables


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, *learned: Tensor) -> Any:
        out, lse = run_forward(q, k, v, sinks, call)
        # What functions captured is read again in backward: PyTorch then says if it has changed.
        captured = (*call.variant.score_tables, *call.variant.mask_tables)
        ctx.save_for_backward(q, k, v, sinks, out, lse, *(t for t in captured if not t.is_inference()))
        ctx.call = call
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @only_once("attention")
    def backward(ctx: Any, *grads: Any) -> Any:
        q, k, v, sinks, out, lse = ctx.saved_tensors[:6]
        grad = torch.zeros_like(out) if grads[0] is None else grads[0]
        call = ctx.call
        turned = q if call.rope is None else _hooks.turn_queries(q, k, call.rope, call.packed)
        dq, dk, dv, dsinks, tables = run_backward(turned, k, v, sinks, out, lse, grad, grads[1], call)
        if call.rope is not None:
            dq = _hooks.turn_queries(q, k, call.rope, call.packed, dq)
        return None, dq, dk, dv, dsinks, *tables


def attend(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, packed: Packed | None, hopper: bool = False,
    rope: _hooks.Rope | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Differentiable attention through the kernels.

    Args:
        rope: turns the queries (the keys are turned already); for the Hopper kernels alone.

    Raises:
        Untraceable: a score_mod or mask_mod that no kernel can be made of.
        ValueError: gradients of captured tensors asked for in deterministic mode.
    """
    variant = build(spec, q.device, max(*q.shape[:3], k.shape[1], 1 if packed is None else len(packed.bounds_q)))
    learned = [variant.score_tables[i] for i in variant.learned]
    if learned and spec.deterministic and torch.is_grad_enabled():
        raise ValueError(
            f"captured tensors get their gradients by atomics, whose order varies: {len(learned)} require gradients"
            " with deterministic=True; detach them or take backend='reference'"
        )
    if 0 in (q.shape[0], q.shape[1], k.shape[1]):
        return reference(q, k, v, spec, packed)
    tables = None if rope is None else (rope[0].float().contiguous(), rope[1].float().contiguous())
    call = Call(spec, packed, variant, hopper, tables)
    if not torch.is_grad_enabled() and forward_ad._current_level < 0:
        return run_forward(q, k, v, spec.sinks, call)
    out, lse = _Attention.apply(call, q, k, v, spec.sinks, *learned)  # type: ignore[no-untyped-call]
    return out, lse


@cache
def outside_graph() -> Callable[..., tuple[Tensor, Tensor]]:
    """`attend`, kept out of torch.compile's graphs (made on first use: it loads the whole compiler)."""
    return torch.compiler.disable(attend)  # type: ignore[no-any-return, no-untyped-call]
