"""Quantised products in plain PyTorch, in whole numbers: what the kernels are compared with, and the CPU's path."""

from typing import NamedTuple

import torch
from torch import Tensor

TINY = 2.0**-100
"""The least scale: a group of zeros has it."""


class Quantised(NamedTuple):
    """Activations of M tokens: `codes * scales`, and beside them the outlier channels."""

    codes: Tensor
    """`[M, K]` int8 or e4m3, channels in the layer's order."""
    scales: Tensor
    """`[K / group, M]` fp32, or `[1, M]` for a scale a token."""
    outliers: Tensor | None = None
    """`[M, O]` int8."""
    outlier_scales: Tensor | None = None
    """`[M]` fp32."""


def gathered(x: Tensor, order: Tensor | None) -> Tensor:
    """Channels of `[M, K]` in this order; -1 gives zeros."""
    if order is None:
        return x
    return torch.where(order < 0, 0.0, x[:, order.long().clamp(min=0)])


def integers(x: Tensor, group: int, least: int, most: int, clip: float = 1.0) -> tuple[Tensor, Tensor]:
    """Symmetric codes `[M, K]` int8 of `[M, K]` and scales `[K / group, M]`: `max|x| clip / most`, ties to even."""
    groups = x.float().view(x.shape[0], -1, group)
    scales = (groups.abs().amax(-1, keepdim=True) * (clip / most)).clamp(min=TINY)
    codes = (groups * (1.0 / scales)).round().clamp(least, most).nan_to_num(0.0).to(torch.int8)
    return codes.view(x.shape), scales[..., 0].t().contiguous()


def grouped_product(x: Tensor, scales: Tensor, weight: Tensor, weight_scales: Tensor) -> Tensor:
    """`sum_g (x_g w_g^T) scales_g weight_scales_g`, every `x_g w_g^T` exact: `[M, N]` fp32.

    Args:
        x: codes `[M, K]`; int8, or floating point for activations that are not integers.
        scales: `[G or 1, M]`.
        weight: codes `[N, K]` int8.
        weight_scales: `[G, N]`.
    """
    out = x.new_zeros(x.shape[0], weight.shape[0], dtype=torch.float32)
    width = weight.shape[1] // len(weight_scales)
    for g, of_weight in enumerate(weight_scales.float()):
        at = slice(g * width, (g + 1) * width)
        sums = (x[:, at].double() @ weight[:, at].double().t()).float()  # whole numbers far below 2^53: exact
        out += sums * (scales[g % len(scales), :, None] * of_weight)
    return out
