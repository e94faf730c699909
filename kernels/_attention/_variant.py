"""A call's scores and masks as compiled functions: the hooks of the kernel template."""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trainkit.kernels._attention import _codegen
from trainkit.kernels._attention._captures import remembered
from trainkit.kernels._attention._program import LARGEST, Program, Table, TableGradient, Value, differentiate
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._trace import append


@dataclass(frozen=True, eq=False)
class Traced:
    """The traced score and mask of calls, without the tensors that they captured; `functions` compiles them for a dialect."""

    score: Program | None
    mask: Program | None
    gradient: tuple[Value, list[TableGradient]] | None
    split: int
    """Operations of `score` that the forward pass needs."""
    _modules: dict[str, Any] = field(default_factory=dict)

    def functions(self, dialect: str) -> Any:
        """A module with `score`, `score_grad` and `mask`, None where there is none; dialect triton or gluon."""
        module = self._modules.get(dialect)
        if module is None:
            module = self._modules[dialect] = _codegen.load(self._source(dialect))
        return module

    def _source(self, dialect: str) -> str:
        return _codegen.source(dialect, self.score, self.gradient, self.split, self.mask)

    @property
    def text(self) -> str:
        """All that it is but its tensors."""
        return self._source("triton")

    @property
    def tables(self) -> list[Table]:
        """The captured tensors of score and mask."""
        return [t for program in (self.score, self.mask) if program is not None for t in program.tables]


@dataclass(frozen=True, eq=False)
class Variant:
    """The traced score and mask of one call, and the tensors that they captured: the hooks of the kernel template."""

    traced: Traced
    score_tables: tuple[Tensor, ...] = ()
    mask_tables: tuple[Tensor, ...] = ()

    @property
    def score(self) -> Program | None:
        return self.traced.score

    @property
    def mask(self) -> Program | None:
        return self.traced.mask

    def functions(self, dialect: str) -> Any:
        """As `Traced.functions`."""
        return self.traced.functions(dialect)

    @property
    def learned(self) -> list[int]:
        """Captured tensors of the score that receive gradients, by number."""
        return sorted({g.table for g in self.traced.gradient[1]}) if self.traced.gradient else []

    @property
    def adds(self) -> bool:
        """Whether the score is only added to: its gradient passes as it is."""
        return self.traced.gradient is not None and self.traced.gradient[0].name == "g"

    @property
    def mask_varies_with(self) -> frozenset[str]:
        """Which of b, h, q, k the mask_mod reads."""
        return self.mask.result.deps if self.mask is not None and self.mask.result is not None else frozenset()


def _indices(longest: int) -> list[Value]:
    return [Value(n, "i", frozenset({n}), None, (0, longest)) for n in ("b", "h", "q", "k")]


def _score_program(spec: Spec, device: torch.device, longest: int) -> tuple[Program, Value]:
    program = Program()
    s = value = Value("s", "f", frozenset("sqkbh"))
    if spec.softcap is not None:
        capped = program.value("tanh", program.value("mul", value, 1.0 / spec.softcap))
        value = program.value("mul", capped, float(spec.softcap))
    if spec.alibi_slopes is not None:
        b, h, q, k = _indices(longest)
        off = Value("off", "i", frozenset(), None, (-longest, longest))
        slope = program.load(Table.of(spec.alibi_slopes), (h,) if spec.alibi_slopes.dim() == 1 else (b, h))
        gap = program.value("abs", program.value("sub", program.value("add", q, off), k))
        value = program.value("sub", value, program.value("mul", slope, program.value("float", gap)))
    if spec.score_mod is not None:
        value = append(program, spec.score_mod, [value, *_indices(longest)], device, "score_mod")
    program.result = value if value.kind == "f" else program.value("float", value)
    return program, s


def build(spec: Spec, device: torch.device, longest: int = LARGEST) -> Variant:
    """Trace and differentiate a call's score and mask.

    Args:
        longest: batch entries, heads, queries or keys at most: integers that may leave 32 bits then are counted with 64.

    Raises:
        Untraceable: a score_mod or mask_mod that no kernel can be made of, by operation.
    """
    if spec.softcap is None and spec.alibi_slopes is None and spec.score_mod is None and spec.mask_mod is None:
        return PLAIN
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    functions = [f for f in (spec.score_mod, spec.mask_mod) if f is not None]
    # One trace serves all shorter calls.
    longest = min(max(1 << 16, 1 << (longest - 1).bit_length()), LARGEST)
    said = (spec.softcap, spec.score_mod is None, spec.mask_mod is None, longest)
    captured = () if spec.alibi_slopes is None else (spec.alibi_slopes,)
    make = partial(_trace, spec, device, longest)
    return _bound(remembered(device, functions, said, make, captured)) or _bound(make())  # type: ignore[return-value]


def _bound(traced: Traced) -> Variant | None:
    """With its tensors, unless one has ended that the function had made itself."""
    tables = [() if p is None else p.tensors() for p in (traced.score, traced.mask)]
    return None if any(t is None for t in tables) else Variant(traced, *tables)  # type: ignore[arg-type]


def _trace(spec: Spec, device: torch.device, longest: int) -> Traced:
    score = gradient = None
    split = 0
    if spec.softcap is not None or spec.alibi_slopes is not None or spec.score_mod is not None:
        score, s = _score_program(spec, device, longest)
        split = len(score.ops)
        gradient = differentiate(score, s, Value("g", "f", frozenset("sqkbh")))
    mask = None
    if spec.mask_mod is not None:
        mask = Program()
        result = append(mask, spec.mask_mod, _indices(longest), device, "mask_mod")
        if result.kind != "b":
            raise ValueError("mask_mod must return booleans, got numbers: compare, do not count")
        if result.literal is not None:
            q = Value("q", "i", frozenset("q"))
            result = mask.value("eq" if result.literal else "ne", q, q)
        mask.result = result
    return Traced(score, mask, gradient, split)


PLAIN = Variant(Traced(None, None, None, 0))
