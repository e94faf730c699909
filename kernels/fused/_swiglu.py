"""SwiGLU: `silu(gate) * up` without the tensor between (Shazeer, 2020, GLU variants improve Transformer)."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.kernels._grid import flat
from trainkit.kernels._once import only_once
from trainkit.kernels.fused._launch import fusible, on

BLOCK = 2048
"""Columns a program, at most."""


def reference(gate: Tensor, up: Tensor) -> Tensor:
    """The formula, in fp32 for 16-bit inputs."""
    work = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(work)) * up.to(work)).to(gate.dtype)


def _rows(x: Tensor) -> Tensor:
    """The tensor as `[rows, columns]`, in place where its rows lie evenly."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def _run(kernel: Any, *matrices: Tensor) -> None:
    """A kernel over matrices of one shape, each with its own distance between rows."""
    rows, columns = matrices[0].shape
    if rows == 0:
        return
    block = min(BLOCK, max(16, 1 << (columns - 1).bit_length()))
    blocks = -(-columns // block)
    with on(matrices[0]):
        kernel[flat((blocks, rows))](*matrices, *(x.stride(0) for x in matrices), columns, blocks, BLOCK=block)


def _forward(gate: Tensor, up: Tensor) -> Tensor:
    from trainkit.kernels.fused import _swiglu_kernels as kernels

    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    _run(kernels.forward, _rows(gate), _rows(up), _rows(y))
    return y


def _backward(gate: Tensor, up: Tensor, grad: Tensor) -> Tensor:
    """The gradients of gate and up, side by side."""
    from trainkit.kernels.fused import _swiglu_kernels as kernels

    both = torch.empty(*gate.shape[:-1], 2 * gate.shape[-1], dtype=gate.dtype, device=gate.device)
    _run(kernels.backward, *map(_rows, (gate, up, grad, *both.chunk(2, -1))))
    return both


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _forward(gate, up)

    @staticmethod
    @only_once("swiglu")
    def backward(ctx: Any, *grads: Any) -> Any:
        gate, up = ctx.saved_tensors
        return _backward(gate, up, grads[0]).chunk(2, -1)


@torch.library.custom_op("trainkit::swiglu", mutates_args=())
def swiglu_op(both: Tensor) -> Tensor:
    """SwiGLU of gate and up side by side, whose gradient is one tensor again."""
    return _forward(*both.chunk(2, -1))


@swiglu_op.register_fake
def _(both: Tensor) -> Tensor:
    return both.new_empty(*both.shape[:-1], both.shape[-1] // 2)


@torch.library.custom_op("trainkit::swiglu_backward", mutates_args=())
def swiglu_backward_op(both: Tensor, grad: Tensor) -> Tensor:
    """Its gradient."""
    gate, up = both.chunk(2, -1)
    return _backward(gate, up, grad)


@swiglu_backward_op.register_fake
def _(both: Tensor, grad: Tensor) -> Tensor:
    return both.new_empty(both.shape)


def _setup(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


swiglu_op.register_autograd(lambda ctx, grad: swiglu_backward_op(*ctx.saved_tensors, grad), setup_context=_setup)


def swiglu(gate: Tensor, up: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`.

    Args:
        gate: any shape.
        up: the same shape and dtype; without it, `gate` holds both side by side in its last dimension, as one linear
            layer gives them: then nothing is copied, and a compiled graph keeps the call as one operator.

    Raises:
        ValueError: two shapes or dtypes, or an odd width to halve.
    """
    if up is None:
        if gate.dim() == 0 or gate.shape[-1] % 2:
            raise ValueError(f"gate and up side by side need an even last dimension, got {list(gate.shape)}")
        # In a compiled graph, asking whether Triton is there would be a break, and Inductor needs it anyhow.
        traced = torch.compiler.is_compiling()
        if gate.dtype != torch.float64 and gate.is_cuda if traced else fusible(gate):
            joint: Tensor = swiglu_op(gate)
            return joint
        return reference(*gate.chunk(2, -1))
    if gate.shape != up.shape or gate.dtype != up.dtype:
        got = f"{list(gate.shape)} {gate.dtype} and {list(up.shape)} {up.dtype}"
        raise ValueError(f"gate and up must share shape and dtype, got {got}")
    if gate.dim() and fusible(gate, up):
        return _SwiGLU.apply(gate, up)  # type: ignore[no-untyped-call, no-any-return]
    return reference(gate, up)
