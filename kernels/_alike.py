"""Whether a module and what is to stand for it compute the same: tried, not told from names."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

SCALES = (1.0, 1e-3, 1e3)
"""Of the random input: where an epsilon counts, and where a clamp does."""
CLOSE = {torch.float32: 2e-6, torch.float64: 2e-6, torch.bfloat16: 2e-2, torch.float16: 4e-3}
"""Of the largest value: the order of a sum, and in 16 bits where it is rounded in between."""


@contextmanager
def _mode(module: nn.Module, training: bool) -> Iterator[None]:
    before = [(m, m.training) for m in module.modules()]
    try:
        module.train(training)
        yield
    finally:
        for m, was in before:
            m.training = was


@contextmanager
def _exact() -> Iterator[None]:
    """Products in fp32 as they are."""
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def configuration(module: nn.Module) -> Any:
    """What decides what a module computes, but the numbers in its tensors: of two that share it, one need be tried."""
    said: list[Any] = []
    for name, x in sorted(vars(module).items()):
        if isinstance(x, int | float | str | None):
            said.append((name, x))
        elif name not in ("_parameters", "_buffers", "_modules") and not (isinstance(x, dict | set) and not x):
            # Whatever else it holds may count: the same object is the same.
            said.append((name, id(x)))
    tensors = [(n, tuple(t.shape), t.dtype, t.device) for n, t in [*module._parameters.items(), *module._buffers.items()]
               if t is not None]  # fmt: skip
    return (type(module), *said, *tensors, *((n, configuration(m)) for n, m in module.named_children()))


def difference(module: nn.Module, fused: Callable[[Tensor], Tensor], width: int, any_weight: bool) -> str | None:
    """How `fused`, which reads the module's attributes, differs from the module's forward; None if it does not.

    Args:
        width: of the input's last dimension.
        any_weight: try random parameters instead of the module's own, which may be all one.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    if any(t.is_meta for t in tensors.values()):
        return "its parameters are on the meta device: load them first"
    kinds = {t.dtype for t in tensors.values() if t.is_floating_point()}
    # Quantised weights have no other type to be tried in.
    plain = len(kinds) == 1 and all(t.is_floating_point() for t in tensors.values())
    own = next(iter(kinds), torch.float32)
    if own not in CLOSE:
        return f"its parameters are {own}"
    try:
        for dtype in {torch.float32 if plain else own: 0, own: 0}:
            for training in (False, True):
                for scale in SCALES[:1] if training else SCALES:
                    reason = _differs(module, fused, width, any_weight, dtype, training, scale)
                    if reason is not None:
                        return reason
    except Exception as error:
        return f"it cannot be tried: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return None


def _differs(
    module: nn.Module, fused: Callable[[Tensor], Tensor], width: int, any_weight: bool, dtype: torch.dtype, training: bool,
    scale: float,
) -> str | None:  # fmt: skip
    generator = torch.Generator().manual_seed(0)

    def number(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    tensors: dict[str, Tensor] = {}
    for name, t in [*module.named_parameters(), *module.named_buffers()]:
        x = 0.8 + 0.3 * number(*t.shape) if any_weight else t.detach().clone()
        tensors[name] = x.to(t.device, dtype if t.is_floating_point() else t.dtype)
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    base = (number(2, 3, width) * scale).to(device, dtype)
    results = []
    with _mode(module, training), _exact(), torch.autocast(device.type, enabled=False), torch.enable_grad():
        for forward in (module.forward, fused):
            x = base.clone().requires_grad_()
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                torch.manual_seed(0)
                out = functional_call(_Calls(module, forward), {f"module.{n}": t for n, t in tensors.items()}, (x,))
            if not isinstance(out, Tensor):
                return f"its forward returns a {type(out).__name__}"
            grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(device, out.dtype)
            results.append((out.detach(), *torch.autograd.grad(out, x, grad)))
    for what, old, new in zip(("output", "gradient"), *results, strict=True):
        if old.shape != new.shape or old.dtype != new.dtype:
            return f"its {what} is {old.dtype} {list(old.shape)}, the kernel's {new.dtype} {list(new.shape)}"
        a, b = old.double(), new.double()
        bound = CLOSE[dtype] * a[a.isfinite()].abs().max().item() if a.isfinite().any() else 0.0
        if not torch.equal(a.isfinite(), b.isfinite()) or (a - b)[a.isfinite()].abs().gt(bound).any():
            off = (a - b).abs().nan_to_num().max().item()
            mode = "training" if training else "evaluation"
            return f"its {what} differs by {off:.1e} of {a.abs().nan_to_num().max().item():.1e} in {mode}, {dtype}"
    return None


class _Calls(nn.Module):
    """One function of a module, with the module's tensors to be replaced."""

    def __init__(self, module: nn.Module, forward: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.module = module
        self._forward = forward

    def forward(self, x: Tensor) -> Tensor:
        """The function of x."""
        return self._forward(x)
