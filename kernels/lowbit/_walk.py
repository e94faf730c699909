"""Which layers of a decoder are quantised, and why the others are not."""

from collections.abc import Callable, Iterator

import torch
from torch import nn

from trainkit.kernels.lowbit._configs import Config

SLOWER_UP_TO = 4096 * 4096
"""Weights of a layer up to which the products were slower than bf16 at any number of tokens (one H200)."""

LEAST = 32
"""Channels of the smallest group."""
PLAIN: set[type[nn.Module]] = {nn.Linear}
"""Classes whose forward is a linear layer's; what prepares training adds its own."""


def blocks(model: nn.Module) -> list[str]:
    """Prefixes of the repeated blocks: children of the outermost lists whose children are of one class."""
    found: list[str] = []
    for name, module in model.named_modules():
        if any(name.startswith(p) for p in found) or not isinstance(module, nn.ModuleList) or len(module) == 0:
            continue
        if len({type(child) for child in module}) == 1 and any(isinstance(m, nn.Linear) for m in module.modules()):
            found += [f"{name}.{i}." if name else f"{i}." for i in range(len(module))]
    return found


def candidates(
    model: nn.Module, config: Config, filter_fn: Callable[[nn.Module, str], bool] | None
) -> tuple[dict[str, nn.Linear], dict[str, str]]:
    """Layers to quantise, and the other modules with matrices and why each is left."""
    inside = blocks(model)
    chosen: dict[str, nn.Linear] = {}
    left: dict[str, str] = {}
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(name)
    for name, module in _with_matrices(model):
        reason = _reason(name, module, config, inside, owners)
        if reason is None and filter_fn is not None and not filter_fn(module, name):
            reason = "filter_fn said no"
        if reason is None:
            assert isinstance(module, nn.Linear)
            chosen[name] = module
        else:
            left[name] = reason
    return chosen, left


def device_of(model: nn.Module) -> torch.device:
    """Where the model lies."""
    return next(x.device for x in (*model.parameters(), *model.buffers()))


def _with_matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_modules():
        if any(p.dim() >= 2 for p in module.parameters(recurse=False)):
            yield name, module


def _reason(
    name: str, module: nn.Module, config: Config, inside: list[str], owners: dict[int, list[str]]
) -> str | None:
    """Why a module is left alone; None where it is not."""
    if not any(name.startswith(prefix) for prefix in inside):
        return "outside of the repeated blocks"
    if not isinstance(module, nn.Linear) or type(module) not in PLAIN:
        return f"{type(module).__name__} is no nn.Linear"
    weight = module.weight
    if not weight.is_floating_point():
        return f"its weight is {weight.dtype}"
    if len(set(owners[id(weight)])) > 1:
        return f"shares its weight with {next(n for n in owners[id(weight)] if n != name)}"
    rest = module.in_features - config.outliers_of(module.in_features)
    if rest < LEAST:
        return f"{rest} channels that are no outliers are fewer than {LEAST}"
    if weight.is_cuda and not config.keep_slower and weight.numel() <= SLOWER_UP_TO:
        return f"{weight.numel()} weights: slower than 16 bits (keep_slower=True quantises it nevertheless)"
    return None
