"""A weight's scales and codes: clipping searched by the error that it leaves, rounding with the error passed on (GPTQ)."""

import torch
from torch import Tensor

RATIOS = tuple(1 - 0.05 * i for i in range(9))
"""Clipping that is tried: 1 to 0.6 of a group's maximum (Atom's two ratios are 0.85 and 0.9)."""
DAMPING = 0.01
"""Share of the mean of the Hessian's diagonal that is added to it (Frantar et al., 2023, section 3.3)."""


def scales_of(weight: Tensor, most: int, importance: Tensor | None, clip: float | None) -> Tensor:
    """A scale a row of `[N, group]`, as bf16 holds it: `[N]` fp32.

    Args:
        weight: fp32.
        most: the greatest code.
        importance: `[group]`, mean squares of the channels' activations; None for equal ones.
        clip: share of the maximum, or None for the one of `RATIOS` that leaves the least error.
    """
    top = weight.abs().amax(-1)
    best, least = None, None
    for ratio in RATIOS if clip is None else (clip,):
        scale = stored(top * (ratio / most))
        if clip is not None:
            return scale
        error = (weight - rounded(weight, scale[:, None], most) * scale[:, None]).square()
        error = error.sum(-1) if importance is None else error @ importance
        if best is None or least is None:
            best, least = scale, error
        else:
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    assert best is not None
    return best


def stored(scale: Tensor) -> Tensor:
    """As bf16 holds it; 1 for a group of zeros."""
    scale = scale.bfloat16().float()
    return torch.where(scale > 0, scale, 1.0)


def rounded(weight: Tensor, scale: Tensor, most: int) -> Tensor:
    """Codes, fp32."""
    return (weight / scale).round().clamp(-most, most)


class Blocks:
    """Which channels are rounded how: groups to `most`, and the last `outliers` channels to INT8 with one scale a row."""

    def __init__(self, channels: int, group: int, most: int, outliers: int) -> None:
        main = channels - outliers
        group = group or main
        self.ranges = [(at, min(at + group, main), most) for at in range(0, main, group)]
        if outliers:
            self.ranges.append((main, channels, 127))


def quantised(
    weight: Tensor, blocks: Blocks, hessian: Tensor | None, importance: Tensor | None, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Codes `[N, K]` and scales `[blocks, N]`, both fp32.

    Args:
        weight: `[N, K]`, channels in the layer's order.
        blocks: how they are rounded.
        hessian: `[K, K]`, `sum x x^T` of the calibration: with it, errors are passed on; None rounds each by itself.
        importance: `[K]`, mean squares of the channels; None for equal ones.
        clip: as `scales_of` takes it; outliers are never clipped.
    """
    work = weight.float().clone()
    codes, scales = torch.empty_like(work), []
    inverse = None if hessian is None else _inverse(work, hessian)
    for start, end, most in blocks.ranges:
        chosen = clip if most != 127 else 1.0
        part = None if importance is None else importance[start:end]
        scale = scales_of(work[:, start:end], most, part, chosen)
        scales.append(scale)
        if inverse is None:
            codes[:, start:end] = rounded(work[:, start:end], scale[:, None], most)
            continue
        errors = torch.empty_like(work[:, start:end])
        for k in range(start, end):
            column = work[:, k]
            codes[:, k] = rounded(column, scale, most)
            error = (column - codes[:, k] * scale) / inverse[k, k]
            work[:, k:end] -= error[:, None] * inverse[k, k:end]
            errors[:, k - start] = error
        work[:, end:] -= errors @ inverse[start:end, end:]
    return codes, torch.stack(scales)


def _inverse(weight: Tensor, hessian: Tensor) -> Tensor:
    """The upper Cholesky factor of the damped Hessian's inverse; channels that are always 0 lose their weights."""
    h = hessian.double()
    dead = h.diagonal() == 0
    weight[:, dead] = 0
    h = h + torch.diag(dead.double() + DAMPING * h.diagonal().mean())
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True)
    return factor.float()
