"""The output layer and its cross-entropy without the `[tokens, vocabulary]` tensor: logits live a chunk at a time.

The gradients are computed in the forward pass, while a chunk's logits are there (Hsu et al., Liger Kernel,
section 3.2).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.kernels.fused._launch import fusible


def reference(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The formula, with all logits at once."""
    logits = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
    total = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    return total / (target != ignore_index).sum().clamp(min=1)


def _chunk(tokens: int, vocabulary: int) -> int:
    """Rows at a time: logits of about 512 MB in 16 bits, and no fewer rows than fill a GPU's tiles."""
    return min(tokens, max(1024, 1 << ((256 << 20) // vocabulary).bit_length() - 1))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, chunk: int) -> Tensor:
        from trainkit.kernels.fused import _loss_kernels as kernels

        tokens, vocabulary = x.shape[0], weight.shape[0]
        losses = torch.empty(tokens, dtype=torch.float32, device=x.device)
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        dx = torch.empty_like(x) if needs_x else None
        dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device) if needs_weight else None
        target = target.contiguous()
        for start in range(0, tokens, chunk):
            rows = slice(start, start + chunk)
            logits = x[rows] @ weight.T
            kernels.cross_entropy[(logits.shape[0],)](
                logits, target[rows], losses[rows], vocabulary, ignore_index, 1.0, BLOCK=4096 if x.is_cuda else 64,
                num_warps=8,
            )  # fmt: skip
            if dx is not None:
                torch.mm(logits, weight, out=dx[rows])
            if dweight is not None:
                _accumulate(dweight, logits, x[rows])
        # Unscaled gradients keep 16-bit ones clear of underflow; the mean's factor comes last, in fp32.
        factor = 1.0 / (target != ignore_index).sum().clamp(min=1)
        ctx.dtype = weight.dtype
        ctx.save_for_backward(dx, dweight, factor)
        return losses.sum() * factor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dx, dweight, factor = ctx.saved_tensors
        scale = grads[0] * factor
        return (
            None if dx is None else (dx * scale.to(torch.float32)).to(dx.dtype),
            None if dweight is None else (dweight * scale).to(ctx.dtype),
            None,
            None,
            None,
        )


def _accumulate(total: Tensor, gradient: Tensor, x: Tensor) -> None:
    """Add gradient^T x to total, summed over chunks in fp32; in the product itself where this PyTorch's can."""
    if x.is_cuda and x.dtype != torch.float32 and hasattr(torch.ops.aten.addmm, "dtype_out"):
        torch.ops.aten.addmm.dtype_out(total, gradient.T, x, torch.float32, out=total)
    else:
        total += gradient.T @ x


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, *, ignore_index: int = -100, chunk: int | None = None
) -> Tensor:
    """Mean cross-entropy of `x @ weight.T` against `target`, with gradients of x and weight.

    Args:
        x: `[tokens, N]`; other leading dimensions are flattened.
        weight: `[vocabulary, N]`.
        target: `[tokens]`, int64.
        ignore_index: targets that do not count.
        chunk: rows of logits at a time; default by memory.

    Returns:
        The mean over the counted targets, fp32; 0 without any.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """
    if x.shape[-1] != weight.shape[-1] or weight.dim() != 2 or target.shape != x.shape[:-1]:
        got = f"{list(x.shape)}, {list(weight.shape)}, {list(target.shape)}"
        raise ValueError(f"x, weight and target must be [..., N], [vocabulary, N] and [...], got {got}")
    if target.dtype != torch.int64 or x.dtype != weight.dtype:
        raise ValueError(
            f"target must be int64, x and weight of one dtype, got {target.dtype}, {x.dtype}, {weight.dtype}"
        )
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk counts rows and must be at least 1, got {chunk}")
    x, target = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    if fusible(x, weight):
        size = chunk or _chunk(x.shape[0], weight.shape[0])
        return _LinearCrossEntropy.apply(x, weight, target, ignore_index, size)  # type: ignore[no-untyped-call, no-any-return]
    return reference(x, weight, target, ignore_index)
