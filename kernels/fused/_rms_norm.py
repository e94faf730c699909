"""RMSNorm: `x / rms(x) * weight` in one pass over memory each way (Zhang and Sennrich, 2019, equation 4)."""

from typing import Any

import torch
from torch import Tensor

from trainkit.kernels._grid import flat as flat_grid
from trainkit.kernels._once import only_once
from trainkit.kernels.fused._launch import fusible, on, programs, warps

WIDEST = 65536
"""Elements of a row that one program holds in registers."""


def reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula, in fp32 for 16-bit inputs."""
    work = x.to(torch.promote_types(x.dtype, torch.float32))
    return (work * torch.rsqrt(work.square().mean(-1, keepdim=True) + eps) * weight.to(work.dtype)).to(x.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        import triton

        from trainkit.kernels.fused import _rms_norm_kernels as kernels

        n = x.shape[-1]
        flat = x.contiguous().view(-1, n)
        y, scale = torch.empty_like(flat), torch.empty(flat.shape[0], dtype=torch.float32, device=x.device)
        block = triton.next_power_of_2(n)
        with on(x):
            kernels.forward[flat_grid((flat.shape[0],))](
                flat, weight, y, scale, eps, N=n, BLOCK=block, num_warps=warps(block)
            )
        ctx.save_for_backward(x, weight, scale)
        return y.view(x.shape)

    @staticmethod
    @only_once("rms_norm")
    def backward(ctx: Any, *grads: Any) -> Any:
        import triton

        from trainkit.kernels.fused import _rms_norm_kernels as kernels

        x, weight, scale = ctx.saved_tensors
        n = x.shape[-1]
        flat = x.contiguous().view(-1, n)
        rows = flat.shape[0]
        grad = grads[0].contiguous()
        dx = torch.empty_like(flat)
        shares = programs(flat, rows)
        dw = torch.empty(shares, n, dtype=torch.float32, device=flat.device)
        block = triton.next_power_of_2(n)
        with on(flat):
            kernels.backward[(shares,)](
                flat, weight, scale, grad, dx, dw, rows, N=n, BLOCK=block, num_warps=warps(block)
            )
        return dx.view(grad.shape), dw.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Normalise the last dimension by its root mean square, and scale.

    Args:
        x: `[..., N]`.
        weight: `[N]`.
        eps: added to the mean square.

    Returns:
        `[..., N]` in x's dtype, computed in fp32.

    Raises:
        ValueError: a weight that is no `[N]`.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight must be [{x.shape[-1]}] like x's last dimension, got {list(weight.shape)}")
    if fusible(x, weight) and x.shape[-1] <= WIDEST:
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call, no-any-return]
    return reference(x, weight, eps)
