"""Rotations that spread outliers over all channels: `y = (W R) (R^T x)` with R a Hadamard matrix (Ashkboos et al., 2024)."""

import math
from functools import cache

import torch
from torch import Tensor

LARGEST = 128
"""Side of the matrices that are multiplied; larger rotations are products of two."""


def size(channels: int) -> int:
    """The greatest power of two that divides the channels, at most LARGEST squared: channels are rotated in blocks of it."""
    return min(channels & -channels, LARGEST * LARGEST)


@cache
def _hadamard(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < n:
        h = torch.cat((torch.cat((h, h), 1), torch.cat((h, -h), 1)), 0)
    return (h / math.sqrt(n)).to(device, dtype)


def rotate(x: Tensor) -> Tensor:
    """`[..., K]` rotated; orthogonal and symmetric: twice is once less than none."""
    n = size(x.shape[-1])
    inner = min(n, LARGEST)
    y = x.reshape(*x.shape[:-1], -1, n // inner, inner) @ _hadamard(inner, x.device, x.dtype)
    if n > inner:
        y = _hadamard(n // inner, x.device, x.dtype) @ y
    return y.reshape(x.shape)
