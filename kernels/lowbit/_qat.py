"""Training with the rounding in it: straight-through fake quantisation by the same formulas (Bengio et al., 2013)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.kernels.lowbit._activation import Kind, Recipe, reference
from trainkit.kernels.lowbit._configs import W4A4, W4A8, W8A8, Config
from trainkit.kernels.lowbit._quantize import _replace
from trainkit.kernels.lowbit._rotation import rotate
from trainkit.kernels.lowbit._rounding import Blocks, quantised, stored
from trainkit.kernels.lowbit._walk import PLAIN, candidates


class FakeQuantLinear(nn.Linear):
    """A linear layer that computes what it will once `quantize_` has rounded it; its gradients take rounding for the identity.

    Args:
        layer: whose parameters it has.
        config: what it will be.
    """

    def __init__(self, layer: nn.Linear, config: Config) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight, self.bias, self.config = layer.weight, layer.bias, config

    def forward(self, input: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        x, weight = input, self.weight
        if self.config.rotate:
            x, weight = rotate(x), rotate(weight)
        return F.linear(_through(x, self._rounded_input), _through(weight, self._rounded_weight), self.bias)

    def _rounded_weight(self, weight: Tensor) -> Tensor:
        w = weight.float()
        if isinstance(self.config, W8A8) and self.config.kind == "fp8":
            scales = stored(w.abs().amax(-1) / torch.finfo(torch.float8_e4m3fn).max)[:, None]
            return (w / scales).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scales
        blocks = Blocks(w.shape[1], self.config.group, 127 if isinstance(self.config, W8A8) else 7, 0)
        codes, scales = quantised(w, blocks, None, None, self.config.clip)
        parts = zip(blocks.ranges, scales, strict=True)
        return torch.cat([codes[:, start:end] * scale[:, None] for (start, end, _), scale in parts], 1)

    def _rounded_input(self, x: Tensor) -> Tensor:
        kind: Kind
        if isinstance(self.config, W4A4):
            kind, group = "int4", self.config.group
        elif isinstance(self.config, W4A8):
            kind, group = "fp8", 0
        elif isinstance(self.config, W8A8):
            kind, group = self.config.kind, 0
        else:
            return x
        recipe = Recipe(kind, self.in_features, group)
        codes = reference(x.flatten(0, -2), recipe, None)
        wide = codes.codes.float().view(len(codes.codes), -1, group or recipe.main) * codes.scales.t()[:, :, None]
        return wide.flatten(1)[:, : self.in_features].view(x.shape)


PLAIN.add(FakeQuantLinear)


def _through(x: Tensor, rounding: Callable[[Tensor], Tensor]) -> Tensor:
    """`rounding(x)`, whose gradient is x's."""
    with torch.no_grad():
        change = rounding(x).to(x.dtype) - x
    return x + change


def prepare_qat_(
    model: nn.Module, config: Config, filter_fn: Callable[[nn.Module, str], bool] | None = None
) -> dict[str, str]:
    """Let a decoder's linear layers train with the rounding that `quantize_` will do, in place.

    Train as ever afterwards, then call `quantize_(model, config)` with the same configuration.

    Args:
        model: as `quantize_` takes it.
        config: with `gptq=False` and, for `W4A4`, `outliers=0` (or `rotate=True`): what needs calibration would not be what
            was trained.
        filter_fn: as `quantize_` takes it.

    Returns:
        The layers that were left, and why.

    Raises:
        ValueError: a configuration that needs calibration, or no layer to prepare.
    """
    if config.gptq or config.outliers_of(1 << 16):
        raise ValueError(
            f"training needs gptq=False and no outliers, got {config}: GPTQ and outliers are for after training"
        )
    layers, left = candidates(model, config, filter_fn)
    if not layers:
        raise ValueError(f"nothing to prepare in {type(model).__name__}: it has no linear layers in a repeated block")
    for name, layer in layers.items():
        _replace(model, name, FakeQuantLinear(layer, config))
    return left
