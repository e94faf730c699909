"""The output layer and its cross-entropy without the `[tokens, vocabulary]` tensor: logits live a chunk at a time.

The gradients are computed in the forward pass, while a chunk's logits are there (Hsu et al., Liger Kernel,
section 3.2); those of a loss that is not reduced are computed in backward, from logits computed again.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.kernels._once import only_once
from trainkit.kernels.fused._launch import autocast_dtype, fusible
from trainkit.kernels.fused._loss_chunks import Gradients, Layer, Loss, loss_op, rows, rows_op, scaled, summed

Reduction = Literal["mean", "sum", "none"]


def reference(layer: Layer, loss: Loss, reduction: Reduction) -> Tensor:
    """The formula, with all logits at once."""
    x, weight, bias = layer
    logits = F.linear(x, weight, bias).to(torch.promote_types(x.dtype, torch.float32))
    if loss.cap is not None:
        logits = loss.cap * torch.tanh(logits / loss.cap)
    weights = None if loss.class_weights is None else loss.class_weights.to(logits.dtype)
    losses = F.cross_entropy(
        logits, loss.target, weights, ignore_index=loss.ignore_index, reduction="none", label_smoothing=loss.smoothing
    )
    counted = loss.target != loss.ignore_index
    z = loss.z * torch.where(counted, logits.logsumexp(-1).square(), 0.0) if loss.z else torch.zeros_like(losses)
    if reduction == "none":
        return losses + z
    if reduction == "sum":
        return (losses + z).sum()
    by_weight, by_count = loss.denominators()
    return losses.sum() / by_weight + z.sum() / by_count


class _Summed(torch.autograd.Function):
    """A sum or mean: its gradients wait for the factor alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, source: Tensor, loss: Loss) -> Tensor:
        total, grads, factor = summed(Layer(x, weight, bias), loss, ctx.needs_input_grad[:3])
        ctx.types = tuple(None if t is None else t.dtype for t in (x, weight, bias))
        # The weight for PyTorch to say if it has changed; `source` ties second derivatives to x, which is not kept.
        ctx.save_for_backward(*grads, factor, weight, bias, source)
        return total

    @staticmethod
    @only_once("linear_cross_entropy")
    def backward(ctx: Any, *grads: Any) -> Any:
        dx, dweight, dbias, factor, *_ = ctx.saved_tensors
        return *scaled(grads[0], Gradients(dx, dweight, dbias), factor, ctx.types), None, None


class _Rows(torch.autograd.Function):
    """Each token's loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, loss: Loss) -> Tensor:
        ctx.save_for_backward(x, weight, bias, loss.target, loss.class_weights)
        ctx.loss = loss
        return rows(Layer(x, weight, bias), loss, None, (False, False, False))[0]

    @staticmethod
    @only_once("linear_cross_entropy")
    def backward(ctx: Any, *grads: Any) -> Any:
        x, weight, bias, target, class_weights = ctx.saved_tensors
        loss = ctx.loss._replace(target=target, class_weights=class_weights)
        wanted = ctx.needs_input_grad[:3]
        _, found = rows(Layer(x, weight, bias), loss, grads[0].float().contiguous(), wanted)
        given = (None if g is None else g.to(t.dtype) for g, t in zip(found, (x, weight, bias), strict=True))
        return *given, None


def _chunk(tokens: int, vocabulary: int) -> int:
    """Rows at a time: logits of about 512 MB in 16 bits, and no fewer rows than fill a GPU's tiles."""
    return max(1, min(tokens, max(1024, 1 << ((256 << 20) // vocabulary).bit_length() - 1)))


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    class_weights: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Reduction = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float | None = None,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of `x @ weight.T + bias` against `target`, with gradients of x, weight and bias.

    Under autocast, x, weight and bias are cast as a linear layer's are; the loss is fp32 all the same.

    Args:
        x: `[..., N]`.
        weight: `[vocabulary, N]`.
        target: `[...]`, int64, x's leading dimensions.
        bias: `[vocabulary]`.
        class_weights: `[vocabulary]`: weighs each target's loss, and the mean over them. No gradient.
        ignore_index: targets that do not count.
        reduction: "mean" over the counted targets, "sum", or "none": `[...]`, at the price of the logits once more in
            backward.
        label_smoothing: share of each target that is spread over all classes, as PyTorch's cross-entropy does it.
        z_loss: times the square of each token's log-sum-exp, added to its loss (in a mean over the counted targets).
        softcap: logits become `softcap * tanh(logits / softcap)`.
        chunk: rows of logits at a time; default by memory.

    Returns:
        fp32 (fp64 for fp64 inputs); 0 without counted targets.

    Raises:
        ValueError: shapes, dtypes or numbers that do not fit.

    Example:
        >>> loss = linear_cross_entropy(hidden, head.weight, labels, label_smoothing=0.1)
    """
    if x.shape[-1] != weight.shape[-1] or weight.dim() != 2 or target.shape != x.shape[:-1]:
        got = f"{list(x.shape)}, {list(weight.shape)}, {list(target.shape)}"
        raise ValueError(f"x, weight and target must be [..., N], [vocabulary, N] and [...], got {got}")
    for name, vector in (("bias", bias), ("class_weights", class_weights)):
        if vector is not None and (vector.shape != weight.shape[:1] or not vector.is_floating_point()):
            raise ValueError(
                f"{name} must be floating-point [{weight.shape[0]}], got {vector.dtype} {list(vector.shape)}"
            )
    if class_weights is not None and class_weights.requires_grad and torch.is_grad_enabled():
        raise ValueError("class_weights get no gradient, got some that require it: detach them")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing must be between 0 and 1, got {label_smoothing!r}")
    if not math.isfinite(z_loss):
        raise ValueError(f"z_loss must be finite, got {z_loss!r}")
    if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
        raise ValueError(f"softcap must be positive and finite, got {softcap!r}; None turns it off")
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk counts rows and must be at least 1, got {chunk}")
    cast = autocast_dtype(x)
    if cast is not None and x.dtype != torch.float64:
        x, weight, bias = x.to(cast), weight.to(cast), None if bias is None else bias.to(cast)
    if target.dtype != torch.int64 or x.dtype != weight.dtype or (bias is not None and bias.dtype != x.dtype):
        got = f"{target.dtype}, {x.dtype}, {weight.dtype}{'' if bias is None else f', {bias.dtype}'}"
        raise ValueError(f"target must be int64, and x, weight and bias of one dtype, got {got}")
    layer = Layer(x.reshape(-1, x.shape[-1]), weight, bias)
    size = chunk or _chunk(layer.x.shape[0], weight.shape[0])
    weights = None if class_weights is None else class_weights.detach().contiguous()
    loss = Loss(
        target.reshape(-1),
        weights,
        ignore_index,
        float(label_smoothing),
        float(z_loss),
        softcap,
        reduction == "mean",
        size,
    )
    with torch.autocast(x.device.type, enabled=False):
        result = _run(layer, loss, reduction)
    return result.reshape(target.shape) if reduction == "none" else result


def _run(layer: Layer, loss: Loss, reduction: Reduction) -> Tensor:
    result: Tensor
    tensors = tuple(t for t in layer if t is not None)
    if torch.compiler.is_compiling():
        if not layer.x.is_cuda or layer.x.dtype == torch.float64:
            return reference(layer, loss, reduction)
        # One operator in the graph; whether Triton is there would be a break in it, and Inductor needs it anyhow.
        if reduction == "none":
            result = rows_op(*layer, *loss[:6], loss.chunk, None, [False] * 3)[0]
        else:
            wanted = [t is not None and t.requires_grad and torch.is_grad_enabled() for t in layer]
            result = loss_op(*layer, *loss, wanted)[0]
        return result
    if not fusible(*tensors):
        return reference(layer, loss, reduction)
    if reduction == "none":
        result = _Rows.apply(*layer, loss)  # type: ignore[no-untyped-call]
    else:
        result = _Summed.apply(*layer, layer.x[:0].clone(), loss)  # type: ignore[no-untyped-call]
    return result
