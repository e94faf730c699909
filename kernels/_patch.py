"""`patch(model)`: a model's norms and gated MLPs go through the fused kernels, until `undo()`."""

import types
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from trainkit.kernels._transformers import register_transformers
from trainkit.kernels.fused._rms_norm import rms_norm
from trainkit.kernels.fused._swiglu import swiglu

SILU = ("SiLU", "SiLUActivation")


class Patched:
    """What `patch` changed; a context manager that undoes it."""

    def __init__(self) -> None:
        self.changed: list[str] = []
        """Names of the modules (and "attention") that now run fused."""
        self._undo: list[Callable[[], Any]] = []

    def _replace(self, name: str, module: nn.Module, forward: Callable[..., Tensor]) -> None:
        module.forward = types.MethodType(forward, module)
        self.changed.append(name)
        self._undo.append(lambda: module.__dict__.pop("forward", None))

    def undo(self) -> None:
        """Give every module its own forward back."""
        while self._undo:
            self._undo.pop()()
        self.changed.clear()

    def __enter__(self) -> "Patched":
        return self

    def __exit__(self, *error: object) -> None:
        self.undo()


def _norm(self: nn.Module, x: Tensor) -> Tensor:
    eps = getattr(self, "variance_epsilon", None)
    eps = getattr(self, "eps", None) if eps is None else eps
    weight = self.weight
    assert isinstance(weight, Tensor)
    return rms_norm(x, weight, 1e-6 if eps is None else float(eps))


def _mlp(self: Any, x: Tensor) -> Tensor:
    return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # type: ignore[no-any-return]


def _is_norm(module: nn.Module) -> bool:
    # Gemma's norms share the name and scale by 1 + weight: not this formula.
    name = type(module).__name__
    weight = getattr(module, "weight", None)
    return (
        name.endswith("RMSNorm") and not name.startswith("Gemma") and isinstance(weight, Tensor) and weight.dim() == 1
    )


def _is_mlp(module: nn.Module) -> bool:
    parts = all(isinstance(getattr(module, part, None), nn.Module) for part in ("gate_proj", "up_proj", "down_proj"))
    return parts and type(getattr(module, "act_fn", None)).__name__ in SILU


def patch(model: nn.Module) -> Patched:
    """Run a model's RMSNorms and SwiGLU MLPs through the fused kernels, and a transformers model's attention too.

    Modules are known by what they hold: an `*RMSNorm` with one weight vector; an MLP of `gate_proj`, `up_proj`,
    `down_proj` and a SiLU. Parameters stay where they are, so checkpoints do not change.

    Returns:
        What changed, with `undo()`; usable as a context manager.

    Raises:
        ValueError: a model in which there is nothing to patch.
    """
    done = Patched()
    for name, module in model.named_modules():
        if "forward" in module.__dict__:
            continue
        if _is_norm(module):
            done._replace(name, module, _norm)
        elif _is_mlp(module):
            done._replace(name, module, _mlp)
    switch = getattr(model, "set_attn_implementation", None)
    if switch is not None:
        before = getattr(model.config, "_attn_implementation", None)
        switch(register_transformers())
        done.changed.append("attention")
        done._undo.append(lambda: switch(before))
    if not done.changed:
        raise ValueError(
            f"nothing to patch in {type(model).__name__}: it has no RMSNorm and no SwiGLU MLP that is known"
        )
    return done
