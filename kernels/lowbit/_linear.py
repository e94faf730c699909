"""A linear layer whose weight is quantised, and whose input is as its method has it."""

import dataclasses
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainkit.kernels._once import only_once
from trainkit.kernels.lowbit._activation import Recipe, quantise
from trainkit.kernels.lowbit._packing import BLOCK, padded, unpack
from trainkit.kernels.lowbit._product import Weight4, product4, product8
from trainkit.kernels.lowbit._reference import Quantised
from trainkit.kernels.lowbit._rotation import rotate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """All that a quantised layer is but its numbers; what a file's manifest holds."""

    method: str
    """Name of the configuration: "W4A4", ..."""
    channels: int
    """K: of the input."""
    rows: int
    """N: of the output."""
    weights: Literal["int4", "int8", "fp8"]
    activations: Literal["int4", "int8", "fp8", "16"]
    group: int = 0
    """Channels that share a weight's scale; 0 for all of a row."""
    outliers: int = 0
    """INT8 channels."""
    rotated: bool = False
    """Whether the input is rotated first."""
    clip: float = 1.0
    """Of the activations."""
    shared: str = ""
    """Name of the first layer that has the same input and so the same order of channels; empty for the layer's own order."""
    bias: bool = False

    @property
    def recipe(self) -> Recipe | None:
        """How the input is quantised; None where it is not."""
        if self.activations == "16":
            return None
        return Recipe(self.activations, self.channels, self.group, self.outliers, self.clip)

    @property
    def main(self) -> int:
        """Channels that are not outliers, with padding."""
        return padded(self.channels - self.outliers)


class LowBitLinear(nn.Module):
    """`y = x W^T + b` with W in 4 or 8 bits; made by `quantize_`.

    Differentiable in x: backward multiplies by the dequantised weight and takes rounding the input for the identity. The
    weight itself is frozen. `in_features`, `out_features`, `bias` and `dequantise()` are what an adapter around it needs.

    Args:
        form: its shape and method.
        dtype: of the bias and of what `dequantise` gives.
        device: where its numbers lie.
    """

    codes: Tensor
    scales: Tensor
    outlier_codes: Tensor | None
    outlier_scales: Tensor | None
    order: Tensor | None
    bias: Tensor | None

    def __init__(self, form: Form, dtype: torch.dtype, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.form, self.dtype = form, dtype
        self.in_features, self.out_features = form.channels, form.rows

        def room(name: str, here: bool, *shape: int, dtype: torch.dtype) -> None:
            self.register_buffer(name, torch.zeros(*shape, dtype=dtype, device=device) if here else None)

        four = form.weights == "int4"
        ordered, outliers = bool(form.shared), form.outliers
        shape = (form.main // BLOCK, form.rows, BLOCK // 2) if four else (form.rows, form.main)
        stored = {"int4": torch.uint8, "int8": torch.int8, "fp8": torch.float8_e4m3fn}[form.weights]
        room("codes", True, *shape, dtype=stored)
        room("scales", True, form.main // form.group if four else 1, form.rows, dtype=torch.bfloat16)
        room("outlier_codes", outliers > 0, form.rows, outliers, dtype=torch.int8)
        room("outlier_scales", outliers > 0, form.rows, dtype=torch.bfloat16)
        room("order", ordered, form.main + outliers, dtype=torch.int32)
        room("bias", form.bias, form.rows, dtype=dtype)

    def extra_repr(self) -> str:
        """What printing the model shows."""
        f = self.form
        return f"{f.channels} -> {f.rows}, {f.method}, group {f.group}, outliers {f.outliers}"

    @property
    def nbytes(self) -> int:
        """Bytes of the weight: codes, scales, outliers, and the order of channels where this layer is the first to have it."""
        own = [self.codes, self.scales, self.outlier_codes, self.outlier_scales]
        own += [self.order] if self.first else []
        return sum(x.nbytes for x in own if x is not None)

    first = True
    """Whether no layer before it has the same order of channels."""

    def dequantise(self) -> Tensor:
        """The weight, `[N, K]` in the layer's dtype, as an unquantised layer would have it."""
        f = self.form
        codes = unpack(self.codes) if f.weights == "int4" else self.codes
        group = f.group or f.main
        w = (codes.float().view(f.rows, -1, group) * self.scales.float().t()[:, :, None]).flatten(1)
        if self.outlier_codes is not None and self.outlier_scales is not None:
            w = torch.cat((w, self.outlier_codes.float() * self.outlier_scales.float()[:, None]), 1)
        if self.order is not None:
            inside = self.order >= 0
            plain = w.new_empty(f.rows, f.channels)
            plain[:, self.order[inside].long()] = w[:, inside]
            w = plain
        w = w[:, : f.channels]
        return (rotate(w) if f.rotated else w).to(self.dtype)

    def quantised_input(self, x: Tensor) -> Quantised | None:
        """The codes of `[M, K]`; None where the method has none. Layers that share x share them."""
        recipe = self.form.recipe
        if recipe is None:
            return None
        known = shared_codes(x, self)
        if known is None:
            known = quantise(rotate(x.flatten(0, -2)) if self.form.rotated else x.flatten(0, -2), recipe, self.order)[0]
            share_codes(x, self, known)
        return known

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"the layer takes {self.in_features} channels, got {list(x.shape)}")
        if torch.is_grad_enabled() and x.requires_grad:
            return _Frozen.apply(x, self)  # type: ignore[no-untyped-call, no-any-return]
        return self._product(x)

    def _product(self, x: Tensor) -> Tensor:
        codes = self.quantised_input(x)
        return self.product(codes if codes is not None else x.flatten(0, -2), x.shape, x.dtype)

    def product(self, x: Tensor | Quantised, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """The layer's output of its codes (or 16-bit input `[M, K]`), for an input of this shape and dtype."""
        f = self.form
        if f.weights == "int4":
            weight = Weight4(self.codes, self.scales, self.outlier_codes, self.outlier_scales)
            y = product4(x, weight, recipe=f.recipe, group=f.group, channels=f.channels, bias=self.bias, dtype=dtype)
        else:
            assert isinstance(x, Quantised)
            y = product8(x, self.codes, self.scales[0], bias=self.bias, dtype=dtype)
        return y.view(*shape[:-1], f.rows)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: LowBitLinear) -> Tensor:
        ctx.layer = layer
        return layer._product(x)

    @staticmethod
    @only_once("LowBitLinear")
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] @ ctx.layer.dequantise().to(grads[0].dtype), None


def _key(layer: LowBitLinear) -> tuple[Any, ...]:
    order = layer.order
    return (layer.form.recipe, layer.form.rotated, None if order is None else order.data_ptr())


def shared_codes(x: Tensor, layer: LowBitLinear) -> Quantised | None:
    """What another layer, or the norm before it, has made of the very same x."""
    kept = getattr(x, "_lowbit_codes", None)
    if kept is None or kept[0] != _key(layer) or kept[1] != x._version:
        return None
    codes: Quantised = kept[2]
    return codes


def share_codes(x: Tensor, layer: LowBitLinear, codes: Quantised) -> None:
    """Leave them for the next layer; in inference mode and in compiled code nothing tells whether x has changed since."""
    if not (torch.compiler.is_compiling() or x.is_inference()):
        x._lowbit_codes = (_key(layer), x._version, codes)  # type: ignore[attr-defined]
