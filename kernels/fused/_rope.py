"""Rotary position embedding of q or k in one pass (Su et al., RoFormer, section 3.2; halves paired as in Llama)."""

from typing import Any

import torch
from torch import Tensor

from trainkit.kernels._grid import flat
from trainkit.kernels.fused._launch import fusible, on


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula, in fp32 for 16-bit inputs."""
    work = torch.promote_types(x.dtype, torch.float32)
    low, high = x.to(work).chunk(2, -1)
    c, s = (t.to(work).unsqueeze(-2) for t in (cos, sin))
    return torch.cat([low * c - high * s, high * c + low * s], -1).to(x.dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
    """X turned by the kernel; sign -1 turns back. Tables are contiguous."""
    import triton

    from trainkit.kernels.fused import _rope_kernels as kernels

    x = x if x.stride(-1) == 1 else x.contiguous()
    B, S, H, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    with on(x):
        kernels.rotate[flat((B * S,))](
        x, y, cos, sin, *x.stride()[:3], S, H, S if cos.dim() == 3 else 0, SIGN=sign, D=D,
        HALF=triton.next_power_of_2(D // 2), BH=triton.next_power_of_2(H),
    )  # fmt: skip
    return y


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, sign: int) -> Tensor:
        cos, sin = cos.contiguous(), sin.contiguous()
        ctx.save_for_backward(cos, sin)
        ctx.sign = sign
        return rotated(x, cos, sin, sign)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        # The gradient is the same function, the other way: it can be differentiated as often as one likes.
        cos, sin = ctx.saved_tensors
        return _Rope.apply(grads[0], cos, sin, -ctx.sign), None, None, None  # type: ignore[no-untyped-call]


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + D/2]) of a token by its angle.

    Args:
        x: `[B, S, H, D]`, D even.
        cos: `[S, D/2]` or `[B, S, D/2]`. No gradient.
        sin: the same shape.

    Returns:
        `[B, S, H, D]` in x's dtype.

    Raises:
        ValueError: an odd D, or tables of another shape.
    """
    if x.dim() != 4 or x.shape[-1] % 2:
        raise ValueError(f"x must be [batch, tokens, heads, an even head_dim], got {list(x.shape)}")
    B, S, _, D = x.shape
    if cos.shape != sin.shape or tuple(cos.shape) not in ((S, D // 2), (B, S, D // 2)):
        raise ValueError(f"cos and sin must be [{S}, {D // 2}] or [{B}, ...], got {list(cos.shape)}, {list(sin.shape)}")
    if fusible(x, cos, sin):
        return _Rope.apply(x, cos, sin, 1)  # type: ignore[no-untyped-call, no-any-return]
    return reference(x, cos, sin)
