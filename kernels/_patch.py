"""`patch(model)`: norms and gated MLPs that compute what the fused kernels compute go through them, until `undo()`."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from trainkit.kernels._alike import configuration, difference
from trainkit.kernels._transformers import NAME, register_transformers
from trainkit.kernels.fused._rms_norm import rms_norm
from trainkit.kernels.fused._swiglu import swiglu

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class FusedNorm:
    """Stands for a norm's `forward`; pickled and copied with the module that it belongs to."""

    kind = "RMSNorm"

    def __init__(self, module: nn.Module, eps: str) -> None:
        self.module, self.eps = module, eps

    def __call__(self, x: Tensor) -> Tensor:
        eps = getattr(self.module, self.eps)
        if eps is None:
            # As nn.RMSNorm has it.
            eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps
        return rms_norm(x, self.module.weight, float(eps))  # type: ignore[arg-type]


class FusedMLP:
    """Stands for a gated MLP's `forward`."""

    kind = "SwiGLU"

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor) -> Tensor:
        m: Any = self.module
        return m.down_proj(swiglu(m.gate_proj(x), m.up_proj(x)))  # type: ignore[no-any-return]


class Patched:
    """What `patch` changed and what it left, as a table when printed; a context manager that undoes it."""

    def __init__(self) -> None:
        self.changed: list[str] = []
        """Names of the modules (and "attention") that now run fused."""
        self.left: dict[str, str] = {}
        """Names of those that looked like it and stay as they are, and why."""
        self._kinds: dict[str, str] = {}
        self._undo: list[Callable[[], Any]] = []

    def _replace(self, name: str, module: nn.Module, forward: FusedNorm | FusedMLP) -> None:
        module.forward = forward
        self.changed.append(name)
        self._kinds[name] = f"{type(module).__name__} as {forward.kind}"

        def undo() -> None:
            # Another patch may have its own there by now.
            if module.__dict__.get("forward") is forward:
                del module.__dict__["forward"]

        self._undo.append(undo)

    def undo(self) -> None:
        """Give every module its own forward back; other patches of the model may be undone before or after."""
        while self._undo:
            self._undo.pop()()
        self.changed.clear()

    def __str__(self) -> str:
        rows: dict[tuple[str, str], list[str]] = {}
        for name in self.changed:
            rows.setdefault((self._kinds.get(name, ""), "fused"), []).append(name)
        for name, reason in self.left.items():
            rows.setdefault((self._kinds.get(name, ""), f"left: {reason}"), []).append(name)
        lines = [
            (names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), kind, state)
            for (kind, state), names in rows.items()
        ]
        widths = [max((len(line[i]) for line in lines), default=0) for i in range(2)]
        return "\n".join(f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in lines)

    def __enter__(self) -> "Patched":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def _epsilon(module: nn.Module) -> str | None:
    """The attribute that holds a norm's epsilon, if there is one."""
    for name, x in vars(module).items():
        if "eps" in name.lower() and not name.startswith("_") and (x is None or isinstance(x, float)):
            return name
    return None


def _looks_like(module: nn.Module) -> str | None:
    """What a module might be: "norm", "mlp" or None; what it computes is tried afterwards."""
    weight = getattr(module, "weight", None)
    if "norm" in type(module).__name__.lower() and isinstance(weight, Tensor) and weight.dim() == 1:
        others = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
        return None if isinstance(module, others) else "norm"
    return "mlp" if all(isinstance(getattr(module, p, None), nn.Module) for p in PROJECTIONS) else None


def _fused(module: nn.Module, kind: str) -> FusedNorm | FusedMLP | str:
    """What is to stand for the module's forward, or why nothing can."""
    parameters = inspect.signature(module.forward).parameters.values()
    if len(parameters) != 1 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
        return f"its forward takes ({', '.join(p.name for p in parameters)}), not x alone"
    if kind == "mlp":
        linear: Any = module.gate_proj
        width = getattr(linear, "in_features", None)
        return FusedMLP(module) if isinstance(width, int) else "its gate_proj says no in_features to try it with"
    eps = _epsilon(module)
    if eps is None:
        return "it has no epsilon that could be found"
    others = [n for n, _ in module.named_parameters() if n != "weight"]
    return f"it has parameters {', '.join(others)} besides its weight" if others else FusedNorm(module, eps)


def _width(module: nn.Module, kind: str) -> int:
    part: Any = module.weight if kind == "norm" else module.gate_proj
    return int(part.shape[0] if kind == "norm" else part.in_features)


def patch(model: nn.Module) -> Patched:
    """Run a model's RMSNorms and SwiGLU MLPs through the fused kernels, and a transformers model's attention too.

    A module that looks like one (a norm with one weight vector and an epsilon; an MLP of `gate_proj`, `up_proj` and
    `down_proj`) is tried: its output and gradient on random input, in training and in evaluation, in fp32 and in its own
    type, against the kernel's. What differs, by a `1 + weight`, a multiplier, a clamp, dropout, stays as it is and is listed
    with the reason: `print(patch(model))`. Parameters stay where they are, so checkpoints do not change.

    Returns:
        What changed and what did not, with `undo()`; usable as a context manager.

    Raises:
        ValueError: a model in which there is nothing to patch.
    """
    done = Patched()
    tried: dict[Any, str | None] = {}
    for name, module in model.named_modules():
        kind = _looks_like(module)
        if kind is None:
            continue
        label = name or type(module).__name__
        done._kinds[label] = type(module).__name__
        if isinstance(module.__dict__.get("forward"), FusedNorm | FusedMLP):
            done.left[label] = "patched already"
            continue
        if "forward" in module.__dict__:
            done.left[label] = "its forward was replaced by something else"
            continue
        fused = _fused(module, kind)
        if isinstance(fused, str):
            done.left[label] = fused
            continue
        key = configuration(module)
        if key not in tried:
            tried[key] = difference(module, fused, _width(module, kind), kind == "norm")
        if (reason := tried[key]) is not None:
            done.left[label] = reason
        else:
            done._replace(label, module, fused)
    _switch(model, done)
    if not done.changed:
        why = "".join(f"; {name}: {reason}" for name, reason in [*done.left.items()][:3])
        raise ValueError(
            f"nothing to patch in {type(model).__name__}: no RMSNorm, SwiGLU MLP or attention that is known{why}"
        )
    return done


def _switch(model: nn.Module, done: Patched) -> None:
    """A transformers model's attention."""
    switch, config = getattr(model, "set_attn_implementation", None), getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    if switch is None:
        return
    if before == NAME:
        done.left["attention"] = "patched already"
        return
    try:
        switch(register_transformers())
    except (ValueError, ImportError, NotImplementedError) as error:
        done.left["attention"] = f"the model refuses it: {str(error).splitlines()[0]}"
    if getattr(config, "_attn_implementation", None) != NAME:
        done.left.setdefault("attention", "the model keeps its own")
        return
    done.changed.append("attention")

    def undo() -> None:
        if config is not None and config._attn_implementation == NAME:
            switch(before)

    done._undo.append(undo)
