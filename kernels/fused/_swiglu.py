"""SwiGLU: `silu(gate) * up` without the tensor between (Shazeer, 2020, GLU variants improve Transformer)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.kernels.fused._launch import fusible

BLOCK = 2048


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula, in fp32 for 16-bit inputs."""
    work = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(work)) * up.to(work)).to(gate.dtype)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        from trainkit.kernels.fused import _swiglu_kernels as kernels

        gate, up = gate.contiguous(), up.contiguous()
        y = torch.empty_like(gate)
        kernels.forward[(-(-y.numel() // BLOCK),)](gate, up, y, y.numel(), BLOCK=BLOCK)
        ctx.save_for_backward(gate, up)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        from trainkit.kernels.fused import _swiglu_kernels as kernels

        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        kernels.backward[(-(-gate.numel() // BLOCK),)](
            gate, up, grads[0].contiguous(), dgate, dup, gate.numel(), BLOCK=BLOCK
        )
        return dgate, dup


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate: any shape.
        up: the same shape and dtype.

    Raises:
        ValueError: two shapes or dtypes.
    """
    if gate.shape != up.shape or gate.dtype != up.dtype:
        got = f"{list(gate.shape)} {gate.dtype} and {list(up.shape)} {up.dtype}"
        raise ValueError(f"gate and up must share shape and dtype, got {got}")
    if fusible(gate, up):
        return _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call, no-any-return]
    return reference(gate, up)
