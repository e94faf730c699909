"""What backward wants to know of each row, and the gradient of the sinks."""

import torch
from torch import Tensor

from trainkit.kernels._grid import flat
from trainkit.kernels._launch import PLANS, Launch, signature


def strides_of(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def padded(d: int) -> int:
    return max(16, 1 << (d - 1).bit_length())


def row_delta(out: Tensor, grad: Tensor, grad_lse: Tensor | None) -> Tensor:
    """rowsum(out * grad) minus lse's gradient, fp32 `[B, H, Sq]`."""
    B, S, H, _ = out.shape
    delta = torch.empty(B, H, S, dtype=torch.float32, device=out.device)
    tensors = (out, grad, delta, *(() if grad_lse is None else (grad_lse.contiguous(),)))
    if delta.numel():
        known = signature(*tensors)
        PLANS.get(None if known is None else ("delta", known), lambda: _delta(*tensors))(tensors)
    return delta


def _delta(out: Tensor, grad: Tensor, _: Tensor, grad_lse: Tensor | None = None) -> Launch:
    from trainkit.kernels._attention import _triton_backward

    B, S, H, DV = out.shape
    bm = 64 if out.is_cuda else 32
    return Launch(
        _triton_backward.delta, (*flat((-(-S // bm), H, B)), 1, 1), (), (0, 1, None if grad_lse is None else 3, 2),
        (*strides_of(out), *strides_of(grad), H, S, -(-S // bm), DV, padded(DV), bm, grad_lse is not None),
    )  # fmt: skip


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """`[Hq]`: the sink's weight in each row, times what the row's weights as a whole receive."""
    weight = torch.exp(sinks.float()[None, :, None] - lse).masked_fill(lse == -torch.inf, 0.0)
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)
