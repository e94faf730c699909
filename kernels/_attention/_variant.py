"""A call's scores and masks as compiled functions: the hooks of the kernel template."""

import types
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from trainkit.kernels._attention import _codegen
from trainkit.kernels._attention._program import Program, TableGradient, Value, differentiate
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._trace import append


@dataclass(frozen=True, eq=False)
class Variant:
    """The traced score and mask of a call; `functions` compiles them for one dialect."""

    score: Program | None
    mask: Program | None
    gradient: tuple[Value, list[TableGradient]] | None
    split: int
    """Operations of `score` that the forward pass needs."""
    _modules: dict[str, Any] = field(default_factory=dict)

    def functions(self, dialect: str) -> Any:
        """A module with `score`, `score_grad` and `mask`, None where the variant has none; dialect triton or gluon."""
        module = self._modules.get(dialect)
        if module is None:
            text = _codegen.source(dialect, self.score, self.gradient, self.split, self.mask)
            module = self._modules[dialect] = _codegen.load(text)
        return module

    @property
    def learned(self) -> list[int]:
        """Captured tensors of the score that receive gradients, by number."""
        return sorted({g.table for g in self.gradient[1]}) if self.gradient else []

    @property
    def adds(self) -> bool:
        """Whether the score is only added to: its gradient passes as it is."""
        return self.gradient is not None and self.gradient[0].name == "g"

    @property
    def mask_varies_with(self) -> frozenset[str]:
        """Which of b, h, q, k the mask_mod reads."""
        return self.mask.result.deps if self.mask is not None and self.mask.result is not None else frozenset()


def _indices() -> list[Value]:
    return [Value(n, "i", frozenset({n})) for n in ("b", "h", "q", "k")]


def _score_program(spec: Spec, device: torch.device) -> tuple[Program, Value]:
    program = Program()
    s = value = Value("s", "f", frozenset("sqkbh"))
    if spec.softcap is not None:
        capped = program.value("tanh", program.value("mul", value, 1.0 / spec.softcap))
        value = program.value("mul", capped, float(spec.softcap))
    if spec.alibi_slopes is not None:
        b, h, q, k, off = (Value(n, "i", frozenset(n if n != "off" else "")) for n in ("b", "h", "q", "k", "off"))
        slope = program.load(spec.alibi_slopes, (h,) if spec.alibi_slopes.dim() == 1 else (b, h))
        gap = program.value("abs", program.value("sub", program.value("add", q, off), k))
        value = program.value("sub", value, program.value("mul", slope, program.value("float", gap)))
    if spec.score_mod is not None:
        value = append(program, spec.score_mod, [value, *_indices()], device, "score_mod")
        value = value if value.kind == "f" else program.value("float", value)
    program.result = value
    return program, s


def build(spec: Spec, device: torch.device) -> Variant:
    """Trace and differentiate a call's score and mask.

    Raises:
        Untraceable: a score_mod or mask_mod that no kernel can be made of, by operation.
    """
    if spec.softcap is None and spec.alibi_slopes is None and spec.score_mod is None and spec.mask_mod is None:
        return PLAIN
    functions = [f for f in (spec.score_mod, spec.mask_mod) if f is not None]
    said = (spec.softcap, spec.score_mod is None, spec.mask_mod is None)
    captured = () if spec.alibi_slopes is None else (spec.alibi_slopes,)
    variant: Variant = remembered(device, functions, said, lambda: _build(spec, device), captured)
    return variant


def _build(spec: Spec, device: torch.device) -> Variant:
    score = gradient = None
    split = 0
    if spec.softcap is not None or spec.alibi_slopes is not None or spec.score_mod is not None:
        score, s = _score_program(spec, device)
        split = len(score.ops)
        gradient = differentiate(score, s, Value("g", "f", frozenset("sqkbh")))
    mask = None
    if spec.mask_mod is not None:
        mask = Program()
        result = append(mask, spec.mask_mod, _indices(), device, "mask_mod")
        if result.kind != "b":
            raise ValueError("mask_mod must return booleans, got numbers: compare, do not count")
        mask.result = result if result.literal is None else mask.value("eq", Value("q", "i"), Value("q", "i"))
    return Variant(score, mask, gradient, split)


PLAIN = Variant(None, None, None, 0)
_CACHE: dict[Any, tuple[tuple[Any, ...], Any]] = {}


def remembered(
    device: torch.device,
    functions: list[Callable[..., Any]],
    said: tuple[Any, ...],
    make: Callable[[], Any],
    captured: tuple[Tensor, ...] = (),
) -> Any:
    """What `make` returned for functions of the same code, reaching the same values; made anew where that cannot be told.

    Args:
        said: what else `make` depends on.
        captured: tensors that it depends on.
    """
    objects: list[Any] = []
    parts: list[Any] = [str(device), torch.is_grad_enabled(), said, *(_tensor(x, objects) for x in captured)]
    for function in functions:
        part = _function(function, objects, 0)
        if part is None:
            return make()
        parts.append(part)
    key = tuple(parts)
    known = _CACHE.get(key)
    if known is not None and all(a() is b for a, b in zip(known[0], objects, strict=True)):
        return known[1]
    made = make()
    if len(_CACHE) >= 256:
        _CACHE.pop(next(iter(_CACHE)), None)
    _CACHE[key] = (tuple(weakref.ref(x) for x in objects), made)
    return made


def _tensor(x: Tensor, objects: list[Any]) -> Any:
    objects.append(x)
    # A 0-dim tensor of another device is read as a literal: its value counts, hence the version.
    return (id(x), x.requires_grad, tuple(x.shape), x.stride(), x._version if x.dim() == 0 else 0)


def _function(function: Callable[..., Any], objects: list[Any], depth: int) -> Any:
    """Code, and every value that it can reach by closure, default or global name."""
    if not isinstance(function, types.FunctionType) or depth > 4:
        return None
    code = function.__code__
    objects.append(code)
    parts: list[Any] = [id(code)]
    reached = [c.cell_contents for c in function.__closure__ or ()]
    reached += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    reached += [function.__globals__[n] for n in code.co_names if n in function.__globals__]
    if any(isinstance(c, types.CodeType) for c in code.co_consts):
        return None
    for value in reached:
        if isinstance(value, Tensor):
            parts.append(_tensor(value, objects))
        elif isinstance(value, types.FunctionType):
            part = _function(value, objects, depth + 1)
            if part is None:
                return None
            parts.append(part)
        elif value is None or isinstance(value, int | float | bool | str | torch.dtype):
            parts.append((type(value).__name__, value))
        elif isinstance(value, types.ModuleType | types.BuiltinFunctionType | type):
            parts.append(getattr(value, "__name__", ""))
        else:
            return None
    return tuple(parts)
