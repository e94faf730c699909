"""The output layer and its cross-entropy without the `[tokens, vocabulary]` tensor: logits live a chunk at a time.

The gradients are computed in the forward pass, while a chunk's logits are there (Hsu et al., Liger Kernel,
section 3.2).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.kernels._gluon import why_not
from trainkit.kernels.fused._launch import fusible

KEPT_BLOCK = 4096
KEPT_BYTES = 112 << 10
"""A row that shared memory keeps: two of them fit in a multiprocessor's."""


def reference(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """The formula, with all logits at once."""
    logits = (x @ weight.T).to(torch.promote_types(x.dtype, torch.float32))
    total = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="sum")
    return total / (target != ignore_index).sum().clamp(min=1)


def _chunk(tokens: int, vocabulary: int) -> int:
    """Rows at a time: logits of about 512 MB in 16 bits, and no fewer rows than fill a GPU's tiles."""
    return min(tokens, max(1024, 1 << ((256 << 20) // vocabulary).bit_length() - 1))


def _cross_entropy(x: Tensor, vocabulary: int) -> tuple[Any, dict[str, int]]:
    """The kernel that turns rows of logits into their gradients, and its constants."""
    blocks = -(-vocabulary // KEPT_BLOCK)
    if vocabulary % 16 == 0 and blocks * KEPT_BLOCK * x.element_size() <= KEPT_BYTES and why_not(x) is None:
        from trainkit.kernels.fused._loss_hopper import cross_entropy as kept

        return kept, {"BLOCK": KEPT_BLOCK, "BLOCKS": blocks, "num_warps": 8}
    from trainkit.kernels.fused._loss_kernels import cross_entropy

    block = min(4096, 1 << (vocabulary - 1).bit_length()) if x.is_cuda else 64
    return cross_entropy, {"BLOCK": block, "num_warps": max(1, block // 512)}


def _loss_and_gradients(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, chunk: int, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The loss, its gradients but for a factor (empty where not needed; the weight's in fp32), and that factor."""
    tokens, vocabulary = x.shape[0], weight.shape[0]
    losses = torch.empty(tokens, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if needs_x else x.new_empty(0)
    dweight: Tensor | None = None
    target = target.contiguous()
    cross_entropy, options = _cross_entropy(x, vocabulary)
    for start in range(0, tokens, chunk):
        rows = slice(start, start + chunk)
        logits = x[rows] @ weight.T
        cross_entropy[(logits.shape[0],)](logits, target[rows], losses[rows], vocabulary, ignore_index, 1.0, **options)
        if needs_x:
            torch.mm(logits, weight, out=dx[rows])
        if needs_weight:
            dweight = _added(dweight, logits, x[rows])
    if dweight is None:
        dweight = torch.zeros(weight.shape if needs_weight else 0, dtype=torch.float32, device=x.device)
    # Unscaled gradients keep 16-bit ones clear of underflow; the mean's factor comes last, in fp32.
    factor = 1.0 / (target != ignore_index).sum().clamp(min=1)
    return losses.sum() * factor, dx, dweight, factor


def _scaled(grad: Tensor, dx: Tensor, dweight: Tensor, factor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    scale = (grad * factor).to(torch.float32).reshape(1)  # without a dimension a GPU would round it to dx's type first
    return (dx * scale).to(dx.dtype), (dweight * scale).to(dtype)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, chunk: int) -> Tensor:
        ctx.dtype = weight.dtype
        loss, *saved = _loss_and_gradients(x, weight, target, ignore_index, chunk, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*saved)
        return loss

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dx, dweight, factor = ctx.saved_tensors
        given = _scaled(grads[0], dx, dweight, factor, ctx.dtype)
        return (
            *(g if needed else None for g, needed in zip(given, ctx.needs_input_grad, strict=False)),
            None,
            None,
            None,
        )


@torch.library.custom_op("trainkit::linear_cross_entropy", mutates_args=())
def loss_op(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, chunk: int, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The fused loss for compiled graphs; results as of `_loss_and_gradients`."""
    return _loss_and_gradients(x, weight, target, ignore_index, chunk, needs_x, needs_weight)


@loss_op.register_fake
def _(
    x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, chunk: int, needs_x: bool, needs_weight: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if needs_x else x.new_empty(0)
    dweight = weight.new_empty(weight.shape if needs_weight else (0,), dtype=torch.float32)
    return x.new_empty((), dtype=torch.float32), dx, dweight, x.new_empty((), dtype=torch.float32)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.dtype, ctx.needs = inputs[1].dtype, inputs[5:7]


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    dx, dweight, factor = ctx.saved_tensors
    given = _scaled(grad, dx, dweight, factor, ctx.dtype)
    return (*(g if needed else None for g, needed in zip(given, ctx.needs, strict=True)), *(None,) * 5)


loss_op.register_autograd(_backward, setup_context=_setup)


def _added(total: Tensor | None, gradient: Tensor, x: Tensor) -> Tensor:
    """Add gradient^T x to a total, over chunks in fp32: in the product itself where this PyTorch's can."""
    if not (x.is_cuda and x.dtype != torch.float32 and hasattr(torch.ops.aten.addmm, "dtype_out")):
        product = (gradient.T @ x).float()
        return product if total is None else total.add_(product)
    if total is None:
        total = torch.ops.aten.mm.dtype(gradient.T, x, torch.float32)
        return total
    torch.ops.aten.addmm.dtype_out(total, gradient.T, x, torch.float32, out=total)
    return total


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
    size = chunk or _chunk(x.shape[0], weight.shape[0])
    if torch.compiler.is_compiling() and x.is_cuda and x.dtype != torch.float64:
        # One operator in the graph; whether Triton is there would be a break in it, and Inductor needs it anyhow.
        needs_x, needs_weight = (t.requires_grad and torch.is_grad_enabled() for t in (x, weight))
        loss: Tensor = loss_op(x, weight, target, ignore_index, size, needs_x, needs_weight)[0]
        return loss
    if fusible(x, weight):
        return _LinearCrossEntropy.apply(x, weight, target, ignore_index, size)  # type: ignore[no-untyped-call, no-any-return]
    return reference(x, weight, target, ignore_index)
