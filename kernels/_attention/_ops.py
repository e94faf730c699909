"""`trainkit::attention` for torch.compile: the kernels as opaque, differentiable operators with known shapes.

Functions (score_mod, mask_mod) are no operator arguments: calls with them run outside the compiled graph.
"""

from typing import Any

import torch
from torch import Tensor

from trainkit.kernels._attention import _hopper, _triton
from trainkit.kernels._attention._autograd import run_backward, run_forward
from trainkit.kernels._attention._call import Call
from trainkit.kernels._attention._packed import make_packed
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._variant import build

OPTIONS = ("causal", "window", "softcap", "scale", "sigmoid", "dropout_p", "seed", "deterministic")


def make_call(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, alibi: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    options: tuple[Any, ...],
) -> Call:  # fmt: skip
    """What the operators' arguments ask for; `options` in the order of OPTIONS."""
    spec = Spec(alibi_slopes=alibi, sinks=sinks, **dict(zip(OPTIONS, options, strict=True)))
    lack = _triton.why_not(q, v, spec)
    if lack:
        raise ValueError(f"the compiled operator needs a kernel: {lack}; take backend='reference'")
    packed = None if cu_q is None or cu_k is None else make_packed((cu_q, cu_k), q, k)
    variant = build(spec, q.device, max(*q.shape[:3], k.shape[1], 1 if packed is None else len(packed.bounds_q)))
    return Call(spec, packed, variant, _hopper.why_not(q, k, v, spec) is None)


@torch.library.custom_op("trainkit::attention", mutates_args=())
def attention_op(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, alibi: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None,
    causal: bool, window: int | None, softcap: float | None, scale: float, sigmoid: bool, dropout_p: float, seed: int,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention by the kernels: (out, lse), arguments as in `Spec`."""
    options = (causal, window, softcap, scale, sigmoid, dropout_p, seed, deterministic)
    return run_forward(q, k, v, sinks, make_call(q, k, v, sinks, alibi, cu_q, cu_k, options))


@attention_op.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, S, H, _ = q.shape
    return q.new_empty(B, S, H, v.shape[3]), q.new_empty(B, H, S, dtype=torch.float32)


@torch.library.custom_op("trainkit::attention_backward", mutates_args=())
def attention_backward_op(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    alibi: Tensor | None, cu_q: Tensor | None, cu_k: Tensor | None, causal: bool, window: int | None, softcap: float | None,
    scale: float, sigmoid: bool, dropout_p: float, seed: int, deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of q, k, v and the sinks (empty without them)."""
    options = (causal, window, softcap, scale, sigmoid, dropout_p, seed, deterministic)
    call = make_call(q, k, v, sinks, alibi, cu_q, cu_k, options)
    dq, dk, dv, dsinks, _ = run_backward(q, k, v, sinks, out, lse, grad, grad_lse, call)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), q.new_empty(0) if dsinks is None else dsinks


@attention_backward_op.register_fake
def _(
    grad: Tensor, grad_lse: Tensor | None, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    return dq, dk, dv, q.new_empty(0) if sinks is None else torch.empty_like(sinks)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:7])
    ctx.options = inputs[7:]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    out, lse, q, k, v, sinks, alibi, cu_q, cu_k = ctx.saved_tensors
    grad = torch.zeros_like(out) if grad is None else grad
    dq, dk, dv, dsinks = attention_backward_op(
        grad, grad_lse, out, lse, q, k, v, sinks, alibi, cu_q, cu_k, *ctx.options
    )
    return dq, dk, dv, None if sinks is None else dsinks, *(None,) * (len(ctx.options) + 3)


attention_op.register_autograd(_backward, setup_context=_setup)


def compiled(
    q: Tensor, k: Tensor, v: Tensor, spec: Spec, cu_q: Tensor | None, cu_k: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The operator, called with a spec."""
    options = tuple(getattr(spec, name) for name in OPTIONS)
    out, lse = attention_op(q, k, v, spec.sinks, spec.alibi_slopes, cu_q, cu_k, *options)
    return out, lse
