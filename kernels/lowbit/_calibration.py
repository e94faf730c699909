"""What is measured of a model's activations: one pass of the loader, sums a channel, and the Hessian that GPTQ needs."""

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.kernels.lowbit._configs import Config
from trainkit.kernels.lowbit._rotation import rotate
from trainkit.kernels.lowbit._walk import device_of

SAMPLES = 256
"""Tokens kept of each input, on which the activations' clipping is searched."""


class Input:
    """Statistics of one tensor that layers read: K channels."""

    def __init__(self, leader: str, channels: int, device: torch.device, hessian: bool) -> None:
        self.leader = leader
        """Name of the first layer that reads it."""
        self.norm: str | None = None
        """Name of the norm that made it."""
        self.tokens = 0
        self.squares = torch.zeros(channels, device=device)
        self.hessian = torch.zeros(channels, channels, device=device) if hessian else None
        self.samples: list[Tensor] = []

    @property
    def importance(self) -> Tensor:
        """Mean square of each channel: `[K]`."""
        return self.squares / max(self.tokens, 1)

    def add(self, x: Tensor, generator: torch.Generator) -> None:
        """Count these tokens, `[M, K]` fp32."""
        self.tokens += len(x)
        self.squares += x.square().sum(0)
        if self.hessian is not None:
            self.hessian.addmm_(x.t(), x)
        lacking = SAMPLES - sum(map(len, self.samples))
        if lacking > 0:
            rows = torch.randperm(len(x), generator=generator)[: min(lacking, SAMPLES // 4)]
            self.samples.append(x[rows.to(x.device)])


def measure(model: nn.Module, layers: dict[str, nn.Linear], config: Config, loader: Iterable[Any]) -> dict[str, Input]:
    """Run the loader's batches through the model; the input of each layer that they reached, by the layer's name.

    Raises:
        ValueError: a loader without batches, or activations that are not numbers.
    """
    inputs: dict[str, Input] = {}
    seen: dict[int, tuple[weakref.ref[Tensor], str]] = {}
    norms: dict[int, tuple[weakref.ref[Tensor], str]] = {}
    generator = torch.Generator().manual_seed(config.seed)

    def before(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            x: Tensor = arguments[0]
            known = seen.get(id(x))
            if known is not None and known[0]() is x:
                # Another layer has counted it.
                inputs.setdefault(name, inputs[known[1]])
                return
            seen[id(x)] = (weakref.ref(x), name)
            made = inputs.get(name)
            if made is None:
                made = inputs[name] = Input(name, x.shape[-1], x.device, config.gptq)
                norm = norms.get(id(x))
                made.norm = norm[1] if norm is not None and norm[0]() is x else None
            work = x.detach().flatten(0, -2)
            made.add((rotate(work) if config.rotate else work).float(), generator)

        return hook

    def after(name: str) -> Any:
        def hook(module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                norms[id(output)] = (weakref.ref(output), name)

        return hook

    handles: list[Any] = [layer.register_forward_pre_hook(before(name)) for name, layer in layers.items()]
    handles += [
        m.register_forward_hook(after(n)) for n, m in model.named_modules() if "norm" in type(m).__name__.lower()
    ]
    was_training, count = model.training, 0
    model.eval()
    try:
        with torch.no_grad():
            for count, batch in enumerate(_watched(loader, config.progress), 1):
                _call(model, batch)
                for made in dict.fromkeys(inputs.values()):
                    if not bool(made.squares.isfinite().all()):
                        raise ValueError(
                            f"calibration needs finite activations, batch {count} gave {made.leader} one that is not: "
                            "look at that batch, or run the model in fp32 or bf16"
                        )
                seen.clear()
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    if count == 0:
        raise ValueError("calibration needs batches, the loader gave none: give a loader that starts anew each time")
    return inputs


def _watched(loader: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return loader
    from rich.progress import track

    return track(loader, "Calibrating", transient=True)


def _call(model: nn.Module, batch: Any) -> None:
    """The model's forward on what a loader yields: a tensor, a tuple of arguments or a mapping of them."""
    device = device_of(model)

    def moved(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    if isinstance(batch, dict) or hasattr(batch, "keys"):
        model(**{name: moved(batch[name]) for name in batch.keys()})  # noqa: SIM118 (a tokenizer's batch iterates otherwise)
    elif isinstance(batch, list | tuple):
        model(*map(moved, batch))
    else:
        model(moved(batch))
