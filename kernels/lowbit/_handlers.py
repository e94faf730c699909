"""From a linear layer to a quantised one: a function a configuration, registered by `handles`."""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainkit.kernels.lowbit._activation import Recipe, reference
from trainkit.kernels.lowbit._calibration import Input
from trainkit.kernels.lowbit._configs import W4A4, W4A8, W4A16, W8A8, Config
from trainkit.kernels.lowbit._linear import Form, LowBitLinear
from trainkit.kernels.lowbit._packing import BLOCK, pack
from trainkit.kernels.lowbit._rotation import rotate
from trainkit.kernels.lowbit._rounding import Blocks, quantised, stored

Handler = Callable[[nn.Linear, Any, Input | None, Tensor], LowBitLinear]
"""Called with the layer, the configuration, its input's statistics, and `[K]` squared weights of all layers that share it."""
HANDLERS: dict[type[Config], Handler] = {}
RATIOS = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Clipping of activations that is tried; Atom has 0.9."""


def handles(config: type[Config]) -> Callable[[Handler], Handler]:
    """Register a handler for a configuration."""

    def register(handler: Handler) -> Handler:
        HANDLERS[config] = handler
        return handler

    return register


@handles(W4A4)
def _atom(layer: nn.Linear, config: W4A4, measured: Input | None, squares: Tensor) -> LowBitLinear:
    channels = layer.in_features
    outliers = config.outliers_of(channels)
    order = None
    form = Form(
        method=config.name, channels=channels, rows=layer.out_features, weights="int4", activations="int4",
        group=config.group_size, outliers=outliers, rotated=config.rotate, bias=layer.bias is not None,
        shared=measured.leader if measured is not None and not config.rotate else "",
    )  # fmt: skip
    if form.shared:
        assert measured is not None
        sequence = measured.importance.argsort()
        rest = channels - outliers
        order = torch.full((form.main + outliers,), -1, dtype=torch.int32, device=sequence.device)
        order[:rest], order[form.main :] = sequence[:rest].int(), sequence[rest:].int()
    if measured is not None:
        form = dataclasses.replace(form, clip=_clip(measured, form, order, squares))
    return _packed(layer, form, config, measured, order)


def _clip(measured: Input, form: Form, order: Tensor | None, squares: Tensor) -> float:
    """The clipping of activations whose error, weighted by the weights that it meets, is least on the kept tokens."""
    x = torch.cat(measured.samples)
    main = slice(0, form.channels - form.outliers)
    places = slice(None) if order is None else order[main].long()

    def error(ratio: float) -> float:
        recipe = Recipe("int4", form.channels, form.group, form.outliers, ratio)
        q = reference(x, recipe, order)
        back = (q.codes.float().view(len(x), -1, form.group) * q.scales.t()[:, :, None]).flatten(1)[:, main]
        return float(((back - x[:, places][:, main]).square() @ squares[places][main]).sum())

    return min(RATIOS, key=error)


@handles(W4A8)
def _wider(layer: nn.Linear, config: W4A8, measured: Input | None, squares: Tensor) -> LowBitLinear:
    form = Form(
        method=config.name, channels=layer.in_features, rows=layer.out_features, weights="int4", activations="fp8",
        group=config.group_size, bias=layer.bias is not None,
    )  # fmt: skip
    return _packed(layer, form, config, measured, None)


@handles(W4A16)
def _weights_only(layer: nn.Linear, config: W4A16, measured: Input | None, squares: Tensor) -> LowBitLinear:
    form = Form(
        method=config.name, channels=layer.in_features, rows=layer.out_features, weights="int4", activations="16",
        group=config.group_size, bias=layer.bias is not None,
    )  # fmt: skip
    return _packed(layer, form, config, measured, None)


@handles(W8A8)
def _eight(layer: nn.Linear, config: W8A8, measured: Input | None, squares: Tensor) -> LowBitLinear:
    form = Form(
        method=config.name, channels=layer.in_features, rows=layer.out_features, weights=config.kind,
        activations=config.kind, bias=layer.bias is not None,
    )  # fmt: skip
    made = _empty(layer, form)
    weight = layer.weight.detach().float()
    if config.kind == "fp8":
        scales = stored(weight.abs().amax(-1) / torch.finfo(torch.float8_e4m3fn).max)
        codes = weight / scales[:, None]
    else:
        hessian, importance = (None, None) if measured is None else (measured.hessian, measured.importance)
        codes, all_scales = quantised(weight, Blocks(form.channels, 0, 127, 0), hessian, importance, config.clip)
        scales = all_scales[0]
    made.codes.copy_(F.pad(codes.clamp(-448, 448), (0, form.main - form.channels)).to(made.codes.dtype))
    made.scales.copy_(scales[None])
    return made


def _empty(layer: nn.Linear, form: Form) -> LowBitLinear:
    made = LowBitLinear(form, layer.weight.dtype, layer.weight.device)
    if made.bias is not None:
        made.bias.copy_(layer.bias.detach())
    return made


def _packed(layer: nn.Linear, form: Form, config: Config, measured: Input | None, order: Tensor | None) -> LowBitLinear:
    """Round the weight in groups, its outliers in INT8, and pack it."""
    made = _empty(layer, form)
    weight = layer.weight.detach().float()
    weight = rotate(weight) if form.rotated else weight
    hessian, importance = (None, None) if measured is None else (measured.hessian, measured.importance)
    if order is not None and made.order is not None:
        places = order[order >= 0].long()
        weight = weight[:, places]
        importance = None if importance is None else importance[places]
        hessian = None if hessian is None else hessian[places][:, places]
        made.order.copy_(order)
    rest = form.channels - form.outliers
    codes, scales = quantised(
        weight, Blocks(form.channels, form.group, 7, form.outliers), hessian, importance, config.clip
    )
    made.codes.copy_(pack(F.pad(codes[:, :rest], (0, -rest % BLOCK)).to(torch.int8)))
    if made.outlier_codes is not None and made.outlier_scales is not None:
        made.outlier_codes.copy_(codes[:, rest:])
        made.outlier_scales.copy_(scales[-1])
        scales = scales[:-1]
    made.scales.fill_(1)
    made.scales[: len(scales)].copy_(scales)
    return made
