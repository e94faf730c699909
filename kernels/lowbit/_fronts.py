"""What stands before quantised layers, and leaves the codes of its output for them, computed in the same pass."""

from typing import Any

import torch
from torch import Tensor, nn

from trainkit.kernels._alike import configuration, difference
from trainkit.kernels._patch import FusedMLP, FusedNorm, _fused, _looks_like, _width
from trainkit.kernels.fused._launch import fusible
from trainkit.kernels.fused._swiglu import swiglu
from trainkit.kernels.lowbit._activation import Norm, quantise
from trainkit.kernels.lowbit._linear import LowBitLinear, share_codes


def recognised(model: nn.Module) -> dict[str, FusedNorm | FusedMLP]:
    """RMSNorms and SwiGLU MLPs by name: those that compute what the fused kernels compute, which is tried."""
    found: dict[str, FusedNorm | FusedMLP] = {}
    tried: dict[Any, str | None] = {}
    for name, module in model.named_modules():
        kind = _looks_like(module)
        if kind is None or "forward" in module.__dict__:
            continue
        fused = _fused(module, kind)
        if isinstance(fused, str):
            continue
        key = configuration(module)
        if key not in tried:
            tried[key] = difference(module, fused, _width(module, kind), kind == "norm")
        if tried[key] is None:
            found[name] = fused
    return found


class CodingNorm:
    """Stands for an RMSNorm's `forward`: its output, and beside it what `layer` makes of it.

    Args:
        norm: the norm, recognised.
        layer: the first of the layers that read its output.
    """

    def __init__(self, norm: FusedNorm, layer: LowBitLinear) -> None:
        self.norm, self.layer = norm, layer

    def __call__(self, x: Tensor) -> Tensor:
        module: Any = self.norm.module
        recipe = self.layer.form.recipe
        if recipe is None or not _plain(x, module.weight):
            return self.norm(x)
        eps = getattr(module, self.norm.eps)
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if eps is None else float(eps)
        codes, y = quantise(x.flatten(0, -2), recipe, self.layer.order, norm=Norm(module.weight, eps), keep=True)
        assert y is not None
        y = y.view(x.shape)
        share_codes(y, self.layer, codes)
        return y


class CodingMLP:
    """Stands for a SwiGLU MLP's `forward`: the gated product goes from registers into the codes of `down_proj`."""

    def __init__(self, mlp: FusedMLP) -> None:
        self.mlp = mlp

    def __call__(self, x: Tensor) -> Tensor:
        m: Any = self.mlp.module
        gate, up = m.gate_proj(x), m.up_proj(x)
        down = m.down_proj
        if not isinstance(down, LowBitLinear) or down.form.recipe is None or not _plain(gate, up):
            y: Tensor = down(swiglu(gate, up))
            return y
        codes, _ = quantise(gate.flatten(0, -2), down.form.recipe, down.order, up=up.flatten(0, -2))
        return down.product(codes, gate.shape, gate.dtype)


def _plain(*tensors: Tensor) -> bool:
    """Whether the kernel serves them and no gradient is wanted."""
    return fusible(*tensors) and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def install(model: nn.Module, known: dict[str, FusedNorm | FusedMLP], readers: dict[str, str]) -> list[str]:
    """Let them leave codes where quantised layers read them; whose forward was replaced.

    Args:
        model: quantised.
        known: of `recognised`.
        readers: names of norms, and of the first layer that reads each.
    """
    done = []
    for name, fused in known.items():
        if isinstance(fused, FusedMLP):
            reader: Any = getattr(fused.module, "down_proj", None)
            forward: Any = CodingMLP(fused)
        elif name in readers:
            reader = model.get_submodule(readers[name])
            forward = CodingNorm(fused, reader)
        else:
            continue
        if isinstance(reader, LowBitLinear) and not reader.form.rotated and reader.form.recipe is not None:
            fused.module.forward = forward
            done.append(name)
    return done
