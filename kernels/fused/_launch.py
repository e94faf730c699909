"""Whether a fused kernel can run on a tensor, and launch sizes; the plain formula serves everything else."""

import importlib.util
from functools import cache

import torch
from torch import Tensor


@cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def fusible(*tensors: Tensor) -> bool:
    """Whether Triton serves these tensors: one CUDA device (or its interpreter, asked for), 16 or 32 bits."""
    if not _installed():
        return False
    if any(x.dtype not in (torch.bfloat16, torch.float16, torch.float32) or x.numel() == 0 for x in tensors):
        return False
    if all(x.is_cuda for x in tensors):
        return True
    import triton

    return bool(triton.knobs.runtime.interpret) and all(x.device.type == "cpu" for x in tensors)


def warps(block: int) -> int:
    """Warps for a row of `block` elements."""
    return min(16, max(4, block // 512))


def programs(x: Tensor, rows: int) -> int:
    """Programs that share `rows` rows: two a multiprocessor."""
    if not x.is_cuda:
        return min(rows, 2)
    return min(rows, 2 * torch.cuda.get_device_properties(x.device).multi_processor_count)
