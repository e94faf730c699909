"""Whether a fused kernel can run on a tensor, and launch sizes; the plain formula serves everything else."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from trainkit.kernels._installed import lacking

AUTOCAST = frozenset(kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind))
"""Devices that have it, asked once: torch.compile before 2.13 cannot trace the question."""


def transformed(x: Tensor) -> bool:
    """Whether x is what torch.func's transforms make of a tensor, which has no memory for a kernel."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_functorch_wrapped_tensor(x)


def fusible(*tensors: Tensor) -> bool:
    """Whether Triton serves these tensors: one CUDA device (or its interpreter, asked for), 16 or 32 bits."""
    if not torch.compiler.is_compiling() and lacking():
        return False
    if any(map(transformed, tensors)):
        return False
    if any(x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or x.numel() == 0 for x in tensors):
        return False
    if all(x.is_cuda for x in tensors):
        return True
    if torch.compiler.is_compiling():
        # Off the GPU a compiler fuses the plain formula.
        return False
    import triton

    return bool(triton.knobs.runtime.interpret) and all(x.device.type == "cpu" for x in tensors)


def on(x: Tensor) -> AbstractContextManager[Any]:
    """Where x lies: kernels run on the current device."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return nullcontext()


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast casts x to, as it does for a matrix product; None outside of autocast."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if kind in AUTOCAST and torch.is_autocast_enabled(kind) else None


def warps(block: int) -> int:
    """Warps for a row of `block` elements."""
    return min(16, max(4, block // 512))


def programs(x: Tensor, rows: int) -> int:
    """Programs that share `rows` rows: two a multiprocessor."""
    if not x.is_cuda:
        return min(rows, 2)
    return min(rows, 2 * torch.cuda.get_device_properties(x.device).multi_processor_count)
