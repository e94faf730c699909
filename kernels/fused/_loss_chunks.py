"""The output layer's loss and gradients a chunk of tokens at a time, and the operators that a compiled graph calls."""

from typing import Any, List, NamedTuple  # noqa: UP035

import torch
from torch import Tensor

from trainkit.kernels._gluon import why_not
from trainkit.kernels.fused._launch import on

KEPT_BLOCK = 4096
KEPT_BYTES = 112 << 10
"""A row that shared memory keeps: two of them fit in a multiprocessor's."""


class Layer(NamedTuple):
    """What is multiplied: tokens `[tokens, N]`, weight `[vocabulary, N]`, bias `[vocabulary]`."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None


class Loss(NamedTuple):
    """What is made of the logits."""

    target: Tensor
    class_weights: Tensor | None
    ignore_index: int
    smoothing: float
    z: float
    cap: float | None
    mean: bool
    chunk: int

    def denominators(self) -> tuple[Tensor, Tensor]:
        """Of the mean: the counted targets' weights, and how many targets count; each at least what makes 0 / it 0."""
        counted = self.target != self.ignore_index
        n = counted.sum().clamp(min=1).to(torch.float32)
        if self.class_weights is None:
            return n, n
        known = counted & (self.target >= 0) & (self.target < self.class_weights.shape[0])
        weights = self.class_weights.float()[torch.where(known, self.target, 0)] * known
        total = weights.sum()
        return torch.where(total == 0, 1.0, total), n

    def numbers(self, x: Tensor, vocabulary: int) -> Tensor:
        """fp32 `[2]`: what multiplies the squared log-sum-exp, and the sum of the class weights."""
        z, total = x.new_full((1,), self.z, dtype=torch.float32), x.new_full((1,), vocabulary, dtype=torch.float32)
        if self.class_weights is not None:
            total = self.class_weights.sum(0, keepdim=True, dtype=torch.float32)
            if self.mean and self.z:
                # Against the mean's two denominators: everything is divided by the first in the end.
                by_weight, by_count = self.denominators()
                z = z * by_weight / by_count
        return torch.cat([z, total])

    def plain(self) -> bool:
        return self.class_weights is None and self.smoothing == 0 and self.z == 0 and self.cap is None


class Gradients(NamedTuple):
    """Each None where it is not wanted; the weight's and the bias's are in fp32."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def rows(layer: Layer, loss: Loss, scales: Tensor | None, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, Gradients]:
    """Each token's loss, fp32, and the gradients of their sum.

    Args:
        scales: fp32 `[tokens]`: what the sum weighs each token's loss with; None for 1.
    """
    x, weight, bias = layer
    tokens, vocabulary = x.shape[0], weight.shape[0]
    losses = torch.empty(tokens, dtype=torch.float32, device=x.device)
    dx = torch.empty_like(x) if wanted[0] else None
    dweight: Tensor | None = None
    dbias = torch.zeros(vocabulary, dtype=torch.float32, device=x.device) if wanted[2] else None
    numbers = loss.numbers(x, vocabulary)
    target = loss.target.contiguous()
    with on(x):
        for start in range(0, tokens, loss.chunk):
            part = slice(start, start + loss.chunk)
            logits = x[part] @ weight.T if bias is None else torch.addmm(bias, x[part], weight.T)
            _cross_entropy(logits, target[part], losses[part], loss, None if scales is None else scales[part], numbers)
            if dx is not None:
                torch.mm(logits, weight, out=dx[part])
            if wanted[1]:
                dweight = _added(dweight, logits, x[part])
            if dbias is not None:
                dbias += logits.sum(0, dtype=torch.float32)
    if dweight is None and wanted[1]:
        dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
    return losses, Gradients(dx, dweight, dbias)


def keeps(x: Tensor, vocabulary: int) -> bool:
    """Whether shared memory keeps a row of logits between its two passes, as Hopper's kernel does."""
    fits = -(-vocabulary // KEPT_BLOCK) * KEPT_BLOCK * x.element_size() <= KEPT_BYTES
    return vocabulary % 16 == 0 and fits and why_not(x) is None


def _cross_entropy(
    logits: Tensor, target: Tensor, losses: Tensor, loss: Loss, scales: Tensor | None, numbers: Tensor
) -> None:
    """Turn rows of logits into their gradients."""
    vocabulary = logits.shape[1]
    if scales is None and loss.plain() and keeps(logits, vocabulary):
        blocks = -(-vocabulary // KEPT_BLOCK)
        from trainkit.kernels.fused._loss_hopper import cross_entropy as kept

        kept[(logits.shape[0],)](
            logits, target, losses, vocabulary, loss.ignore_index, 1.0, BLOCK=KEPT_BLOCK, BLOCKS=blocks, num_warps=8
        )
        return
    from trainkit.kernels.fused._loss_kernels import cross_entropy

    block = min(4096, 1 << (vocabulary - 1).bit_length()) if logits.is_cuda else 64
    weights = loss.class_weights
    cross_entropy[(logits.shape[0],)](
        logits, target, losses, weights, scales, numbers, vocabulary, loss.ignore_index, loss.smoothing,
        loss.cap or 1.0, WEIGHTED=weights is not None, SCALED=scales is not None, CAP=loss.cap is not None,
        SMOOTH=loss.smoothing > 0, Z_LOSS=loss.z != 0, BLOCK=block, num_warps=max(1, block // 512),
    )  # fmt: skip


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


def summed(layer: Layer, loss: Loss, wanted: tuple[bool, bool, bool]) -> tuple[Tensor, Gradients, Tensor]:
    """Sum or mean of the losses, its gradients but for a factor, and that factor.

    Unscaled gradients keep 16-bit ones clear of underflow; the mean's factor comes last, in fp32.
    """
    losses, grads = rows(layer, loss, None, wanted)
    factor = 1.0 / loss.denominators()[0] if loss.mean else torch.ones((), dtype=torch.float32, device=losses.device)
    return losses.sum() * factor, grads, factor


def scaled(grad: Tensor, grads: Gradients, factor: Tensor, layer: tuple[torch.dtype, ...]) -> Gradients:
    """The gradients of a loss whose own is `grad`, in the layer's types."""
    scale = (grad * factor).to(torch.float32).reshape(1)  # without a dimension a GPU would round it to dx's type first
    return Gradients(*(None if g is None else (g * scale).to(t) for g, t in zip(grads, layer, strict=True)))


def _unpacked(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


# an operator's schema in torch 2.6 knows this name alone
Flags = List[bool]  # noqa: UP006


@torch.library.custom_op("trainkit::linear_cross_entropy", mutates_args=())
def loss_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weights: Tensor | None, ignore_index: int,
    smoothing: float, z: float, cap: float | None, mean: bool, chunk: int, wanted: Flags,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The fused loss for compiled graphs; results as of `summed`, empty where not wanted."""
    loss = Loss(target, class_weights, ignore_index, smoothing, z, cap, mean, chunk)
    total, grads, factor = summed(Layer(x, weight, bias), loss, (wanted[0], wanted[1], wanted[2]))
    return total, _unpacked(grads.x, x), _unpacked(grads.weight, x), _unpacked(grads.bias, x), factor


def _like(x: Tensor, weight: Tensor, wanted: Flags) -> tuple[Tensor, Tensor, Tensor]:
    dx = torch.empty_like(x) if wanted[0] else x.new_empty(0)
    dweight = weight.new_empty(weight.shape, dtype=torch.float32) if wanted[1] else x.new_empty(0)
    return dx, dweight, weight.new_empty(weight.shape[:1], dtype=torch.float32) if wanted[2] else x.new_empty(0)


@loss_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    scalar = x.new_empty((), dtype=torch.float32)
    return scalar, *_like(x, weight, rest[-1]), torch.empty_like(scalar)


@torch.library.custom_op("trainkit::linear_cross_entropy_rows", mutates_args=())
def rows_op(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, class_weights: Tensor | None, ignore_index: int,
    smoothing: float, z: float, cap: float | None, chunk: int, scales: Tensor | None, wanted: Flags,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Each token's loss, and the gradients of their sum weighed by `scales`, empty where not wanted."""
    loss = Loss(target, class_weights, ignore_index, smoothing, z, cap, False, chunk)
    losses, grads = rows(Layer(x, weight, bias), loss, scales, (wanted[0], wanted[1], wanted[2]))
    return losses, _unpacked(grads.x, x), _unpacked(grads.weight, x), _unpacked(grads.bias, x)


@rows_op.register_fake
def _(x: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape[:1], dtype=torch.float32), *_like(x, weight, rest[-1])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*output[1:])
    ctx.types, ctx.wanted = tuple(None if x is None else x.dtype for x in inputs[:3]), inputs[-1]


def _backward(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    *saved, factor = ctx.saved_tensors
    grads = Gradients(*(g if want else None for g, want in zip(saved, ctx.wanted, strict=True)))
    return *scaled(grad, grads, factor, ctx.types), *(None,) * 9


loss_op.register_autograd(_backward, setup_context=_setup)


def _setup_rows(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:10]


def _backward_rows(ctx: Any, grad: Tensor, *unused: Any) -> tuple[Any, ...]:
    layer = ctx.saved_tensors[:3]
    wanted = [bool(need) for need in ctx.needs_input_grad[:3]]
    _, *grads = rows_op(*ctx.saved_tensors, *ctx.options, grad.float().contiguous(), wanted)
    given = (g.to(x.dtype) if want else None for g, x, want in zip(grads, layer, wanted, strict=True))
    return *given, *(None,) * 9


rows_op.register_autograd(_backward_rows, setup_context=_setup_rows)
