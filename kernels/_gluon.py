"""Whether the kernels written in Gluon, which are Hopper's, can run on a tensor."""

from functools import cache

import torch
from torch import Tensor

TRITON = "3.6"
"""Gluon is experimental: its names, and Triton's launcher, change from one version to the next."""


@cache
def triton_version() -> str:
    import triton

    return ".".join(triton.__version__.split(".")[:2])


@cache
def _capability(device: int) -> int:
    return torch.cuda.get_device_capability(device)[0]


def why_not(x: Tensor) -> str | None:
    """The reason they cannot, or None; Triton is installed."""
    if not x.is_cuda or _capability(x.device.index) != 9:
        return "the device is no Hopper GPU"
    if triton_version() != TRITON:
        return f"the Hopper kernels are written in the Gluon of Triton {TRITON}, got {triton_version()}"
    return None
