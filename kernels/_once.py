"""Gradients that cannot be differentiated again say so, instead of being constants in silence."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class _Refusing(torch.autograd.Function):
    """The identity of gradients; differentiating it by what they were computed from raises."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *sources_and_grads: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        return tuple(x.view_as(x) for x in sources_and_grads[count:])

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"{ctx.what} has a kernel for its gradient and none for the gradient's own: for second derivatives take the"
            " plain formula (attention: backend='reference')"
        )


def only_once(what: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """For an autograd Function's `backward`: with `create_graph=True` its results refuse to be differentiated.

    PyTorch's `once_differentiable` does so only where the incoming gradient itself requires gradients: a gradient penalty
    on top of other operations would count with a constant. What the function saves must include its inputs, or something
    made of them.

    Args:
        what: whose gradient it is, for the message.
    """

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(backward)
        def run(ctx: Any, *grads: Any) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                results = backward(ctx, *grads)
            results = results if isinstance(results, tuple | list) else (results,)
            sources = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
            present = [x for x in results if x is not None]
            guarded = iter(_Refusing.apply(what, len(sources), *sources, *present) if present else ())  # type: ignore[no-untyped-call]
            return tuple(None if x is None else next(guarded) for x in results)

        return run

    return decorate
