"""Activations quantised as they are needed: a layer's 16-bit input to codes, with what stands before it in the same pass."""

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.kernels._grid import flat
from trainkit.kernels.fused._launch import fusible, on
from trainkit.kernels.fused._rms_norm import reference as rms_norm
from trainkit.kernels.fused._swiglu import reference as swiglu
from trainkit.kernels.lowbit._packing import padded
from trainkit.kernels.lowbit._reference import TINY, Quantised, gathered, integers

Kind = Literal["int4", "int8", "fp8"]
TOP = {"int4": 7, "int8": 127, "fp8": 448}
"""What a scale maps the greatest magnitude to; fp8's is e4m3's greatest number."""


class Recipe(NamedTuple):
    """How a layer wants its input."""

    kind: Kind
    channels: int
    """K: of the input."""
    group: int
    """Channels that share a scale ("int4"); the others have one scale a token."""
    outliers: int = 0
    """Channels at the order's end that are INT8."""
    clip: float = 1.0
    """Share of a group's maximum that the greatest code stands for."""

    @property
    def main(self) -> int:
        """Channels that are not outliers, with padding."""
        return padded(self.channels - self.outliers)

    @property
    def factor(self) -> float:
        """Scale over maximum, in fp32."""
        return float(torch.tensor(self.clip / TOP[self.kind], dtype=torch.float32))


class Norm(NamedTuple):
    """An RMSNorm before the layer."""

    weight: Tensor
    eps: float


def reference(x: Tensor, recipe: Recipe, order: Tensor | None) -> Quantised:
    """The formulas, for `[M, K]`."""
    work = gathered(x.float(), order)
    if order is None:
        work = F.pad(work, (0, recipe.main + recipe.outliers - recipe.channels))
    main = work[:, : recipe.main]
    if recipe.kind == "int4":
        codes, scales = integers(main, recipe.group, -8, 7, recipe.clip)
    elif recipe.kind == "int8":
        codes, scales = integers(main, recipe.main, -127, 127, recipe.clip)
    else:
        scales = (main.abs().amax(-1) * recipe.factor).clamp(min=TINY)[None]
        codes = (main * (1.0 / scales[0, :, None])).clamp(-448, 448).to(torch.float8_e4m3fn)
    if not recipe.outliers:
        return Quantised(codes, scales)
    outliers, outlier_scales = integers(work[:, recipe.main :], recipe.outliers, -127, 127)
    return Quantised(codes, scales, outliers, outlier_scales[0])


def _front(x: Tensor, norm: Norm | None, up: Tensor | None) -> Tensor:
    if norm is not None:
        return rms_norm(x, norm.weight, norm.eps)
    return x if up is None else swiglu(x, up)


def quantise(
    x: Tensor, recipe: Recipe, order: Tensor | None, *, norm: Norm | None = None,
    up: Tensor | None = None, keep: bool = False,
) -> tuple[Quantised, Tensor | None]:  # fmt: skip
    """Codes of a layer's input, computed from x in one pass.

    Args:
        x: `[M, K]`.
        recipe: what codes.
        order: `[main + outliers]` int32, the channel at each place and -1 for padding; None for the channels' own order.
        norm: x goes through it first.
        up: `[M, K]`, x becomes `silu(x) * up` first.
        keep: also return the layer's 16-bit input, which the norm has computed on its way.

    Returns:
        The codes; the layer's input if `keep`, `[M, K]`.
    """
    beside = up if norm is None else norm.weight
    tensors = [x] if beside is None else [x, beside]
    if not fusible(*tensors) or recipe.main > 65536:
        whole = _front(x, norm, up)
        return reference(whole, recipe, order), whole if keep else None
    import triton

    from trainkit.kernels.lowbit import _activation_kernels as kernels

    x = x if x.stride(-1) == 1 else x.contiguous()
    if up is not None:
        up = up if up.stride() == x.stride() else up.contiguous()
        x = x if x.stride() == up.stride() else x.contiguous()
        beside = up
    rows, main, count = x.shape[0], recipe.main, recipe.outliers
    per_token = recipe.kind != "int4"
    group = min(128, triton.next_power_of_2(main)) if per_token else recipe.group
    stored = torch.int8 if recipe.kind == "int8" else torch.float8_e4m3fn
    new = x.new_empty
    codes = new(rows, main, dtype=stored)
    scales = new(1 if per_token else main // group, rows, dtype=torch.float32)
    outliers = new(rows, count, dtype=torch.int8) if count else None
    outlier_scales = new(rows, dtype=torch.float32) if count else None
    y = new(rows, recipe.channels) if keep and norm is not None else None
    groups = triton.next_power_of_2(triton.cdiv(main, group))
    warps = min(16, max(4, groups * group // 512))
    front = "norm" if norm is not None else "gate" if up is not None else ""
    with on(x):
        kernels.quantise[flat((rows,))](
            x, beside, order, y, codes, scales, outliers, outlier_scales, rows,
            x.stride(0), 0.0 if norm is None else norm.eps, recipe.factor, K=recipe.channels, MAIN=main, COUNT=count,
            GROUP=group, GROUPS=groups, WHOLE=triton.next_power_of_2(recipe.channels),
            OB=triton.next_power_of_2(max(count, 1)), FRONT=front,
            ORDERED=order is not None, KIND=recipe.kind, STORE=y is not None, CHAINED=x.is_cuda, num_warps=warps,
            enable_fp_fusion=False,
        )  # fmt: skip
    kept = (y if y is not None else _front(x, norm, up)) if keep else None
    return Quantised(codes, scales, outliers, outlier_scales), kept
