"""`quantize_`: a decoder's linear layers to 4 or 8 bits, in place."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.kernels._installed import lacking
from trainkit.kernels.lowbit._calibration import Input, measure
from trainkit.kernels.lowbit._configs import Config
from trainkit.kernels.lowbit._fronts import install, recognised
from trainkit.kernels.lowbit._handlers import HANDLERS
from trainkit.kernels.lowbit._linear import LowBitLinear
from trainkit.kernels.lowbit._report import Report, Row
from trainkit.kernels.lowbit._walk import candidates, device_of


def quantize_(
    model: nn.Module, config: Config, loader: Iterable[Any] | None = None,
    filter_fn: Callable[[nn.Module, str], bool] | None = None,
) -> Report:  # fmt: skip
    """Quantise the linear layers of a decoder's blocks, in place.

    Every `nn.Linear` within the model's repeated blocks is replaced; what stands outside of them (embedding, head), what
    shares its weight, what is no plain linear layer and what would get slower is left alone, and the report says so.

    Args:
        model: a causal decoder: a GPT of your own or of transformers.
        config: `W4A4(...)`, `W4A8(...)`, `W8A8(...)` or `W4A16(...)`.
        loader: yields the model's inputs (a tensor, a tuple of arguments, or a mapping of them) for calibration: a few dozen
            batches of real text. Needed by `gptq=True` and by `W4A4`'s outliers.
        filter_fn: called with a layer and its name, says whether to quantise it.

    Returns:
        A report; `print(report)` shows each layer, its exact bits a weight, and why the others were left.

    Raises:
        ValueError: a loader that is missing or empty, activations that are not finite, no layer to quantise.
        TypeError: no configuration of these.

    Example:
        ```python
        from trainkit.kernels import W4A4, quantize_

        report = quantize_(model, W4A4(), loader)
        print(report)
        ```
    """
    handler = HANDLERS.get(type(config))
    if handler is None:
        known = ", ".join(sorted(c.__name__ for c in HANDLERS))
        raise TypeError(f"config must be one of {known}, got {type(config).__name__}: give an instance of one")
    if loader is None and (config.gptq or config.outliers_of(1 << 16)):
        raise ValueError(
            f"{config.name} needs a loader for {'gptq' if config.gptq else 'outliers'}, got None: give one, or gptq=False"
            + (" and outliers=0 (or rotate=True)" if config.outliers_of(1 << 16) else "")
        )
    layers, left = candidates(model, config, filter_fn)
    if not layers:
        raise ValueError(f"nothing to quantise in {type(model).__name__}: {_most_frequent(left)}")
    inputs: dict[str, Input] = {}
    if loader is not None:
        inputs = measure(model, layers, config, loader)
        for name in set(layers) - set(inputs):
            left[name] = "no batch of the loader reached it"
            del layers[name]
    fronts = recognised(model)
    rows = {name: _row_left(model.get_submodule(name), name, reason) for name, reason in left.items()}
    orders: dict[str, Tensor] = {}
    for alike in _by_input(layers, inputs):
        measured = inputs.get(alike[0])
        squares = torch.stack([layers[n].weight.detach().float().square().sum(0) for n in alike]).sum(0)
        for name in alike:
            layer = layers[name]
            made = handler(layer, config, measured, squares)
            link(made, orders)
            rows[name] = Row(name, config.name, layer.weight.numel(), made.nbytes, layer.weight.nbytes)
            _replace(model, name, made.train(layer.training))
        if measured is not None:
            measured.hessian = None  # the largest of what calibration holds
    install(model, fronts, {i.norm: i.leader for i in inputs.values() if i.norm is not None})
    ordered = tuple(rows[name] for name, _ in model.named_modules() if name in rows)
    return Report(ordered, config.kv_bits, _backend(model))


def link(made: LowBitLinear, orders: dict[str, Tensor]) -> None:
    """Let layers that share an input have one order of channels, not equal ones."""
    if made.order is not None:
        made.first = made.form.shared not in orders
        made.order = orders.setdefault(made.form.shared, made.order)


def _by_input(layers: dict[str, nn.Linear], inputs: dict[str, Input]) -> list[list[str]]:
    """Names of the layers, those that read one tensor together."""
    found: dict[Any, list[str]] = {}
    for name in layers:
        found.setdefault(id(inputs[name]) if name in inputs else name, []).append(name)
    return list(found.values())


def _replace(model: nn.Module, name: str, made: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, made)


def _row_left(module: nn.Module, name: str, reason: str) -> Row:
    matrices = [p for p in module.parameters(recurse=False) if p.dim() >= 2]
    size = sum(p.nbytes for p in matrices)
    return Row(name, "", sum(p.numel() for p in matrices), size, size, reason)


def _most_frequent(left: dict[str, str]) -> str:
    reasons = list(left.values())
    return max(reasons, key=reasons.count, default="it has no linear layers in a repeated block (nn.ModuleList)")


def _backend(model: nn.Module) -> str:
    """What will multiply where the model lies now."""
    device = device_of(model)
    missing = lacking()
    if missing:
        return f"the reference in PyTorch, slow: {missing}"
    if device.type != "cuda":
        return f"the reference in PyTorch, slow: the kernels need a CUDA device, the model lies on {device}"
    return "Triton kernels"
