"""What a user's function can reach, and what is kept for functions that reach the same."""

import types
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from trainkit.kernels._attention._program import Table
from trainkit.kernels._cache import Cache, identity

STEADY = ("torch", "math", "operator", "cmath")
"""Modules whose names always mean the same. Of others, of classes and of objects the attributes may change unseen."""
PLAIN = (int, float, bool, str, complex, bytes, type(None), torch.dtype, torch.device, torch.layout)


class Unseen(Exception):
    """A function reaches what cannot be looked through."""


class Kept(Protocol):
    """What is made of functions: it names the tensors that they captured, weakly."""

    @property
    def tables(self) -> Sequence[Table]: ...

    @property
    def text(self) -> str:
        """All else that it is."""


K = TypeVar("K", bound=Kept)
_TRACES: Cache[Any] = Cache(256)
_ALIKE: Cache[Any] = Cache(256)


def remembered(
    device: torch.device, functions: Sequence[Callable[..., Any]], said: tuple[Any, ...], make: Callable[[], K],
    captured: Sequence[Tensor] = (),
) -> K:  # fmt: skip
    """What `make` returned for functions of the same code that reach the same values.

    A function that reaches what may change unseen is evaluated anew each time; what comes out, if it is what came out
    before, is still one object, with all that is kept for it.

    Args:
        said: what else `make` depends on.
        captured: tensors that it depends on.
    """
    objects: list[Any] = list(captured)
    key = (str(device), torch.is_grad_enabled(), torch.get_default_dtype(), said, *map(identity, captured))
    try:
        parts = tuple(_function(f, objects, device, 0) for f in functions)
    except Unseen:
        return _alike(make())
    return _TRACES.get((*key, parts), lambda: _alike(make()), objects)  # type: ignore[no-any-return]


def _alike(made: K) -> K:
    bases = [t.base() for t in made.tables]
    if any(x is None for x in bases):
        return made
    parts = tuple((*identity(x), t.shape, t.stride, t.requires_grad) for x, t in zip(bases, made.tables, strict=True))  # type: ignore[arg-type]
    return _ALIKE.get((made.text, parts), lambda: made, bases)  # type: ignore[no-any-return]


def _function(function: Any, objects: list[Any], device: torch.device, depth: int) -> Any:
    """Code, and every value that it can reach by closure, default or global name."""
    if not isinstance(function, types.FunctionType) or depth > 8:
        raise Unseen
    code = function.__code__
    if any(isinstance(c, types.CodeType) for c in code.co_consts):
        raise Unseen
    objects.append(code)
    try:
        reached = [c.cell_contents for c in function.__closure__ or ()]
    except ValueError as error:  # a cell that is still empty
        raise Unseen from error
    reached += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    reached += [function.__globals__[n] for n in code.co_names if n in function.__globals__]
    return (id(code), *(_value(x, objects, device, depth) for x in reached))


def _value(x: Any, objects: list[Any], device: torch.device, depth: int) -> Any:
    if isinstance(x, Tensor):
        objects.append(x)
        # A 0-dim tensor of another device is read as a literal: its value counts.
        return (*identity(x), x.item() if x.dim() == 0 and x.device != device and x.numel() else None)
    if isinstance(x, PLAIN):
        return (type(x).__name__, repr(x))
    if isinstance(x, tuple):
        return tuple(_value(y, objects, device, depth + 1) for y in x)
    if isinstance(x, types.FunctionType):
        if (x.__module__ or "").split(".")[0] == "torch":
            objects.append(x)
            return id(x)
        return _function(x, objects, device, depth + 1)
    owner = x if isinstance(x, types.ModuleType) else getattr(x, "__self__", None)
    builtin = isinstance(x, types.BuiltinFunctionType) and (owner is None or isinstance(owner, types.ModuleType))
    if isinstance(x, types.ModuleType) or (builtin and owner is not None):
        name = getattr(owner, "__name__", "")
        if name.split(".")[0] in STEADY or name == "builtins":
            return (name, getattr(x, "__name__", ""))
    if builtin or any(x is t for t in (int, float, bool)):
        return getattr(x, "__qualname__", "")
    raise Unseen
