"""A straight-line program of scalar operations: what a score or mask does to one element, and its derivative.

Built from a trace (`_trace.py`), printed as a Triton function (`_codegen.py`).
"""

import math
import operator
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

INPUTS = ("b", "h", "q", "k", "off")
"""Batch entry or sequence, query head, query index, key index, Sk - Sq."""


Interval = tuple[int, int]
INT32: Interval = (-(1 << 31), (1 << 31) - 1)
INT64: Interval = (-(1 << 63), (1 << 63) - 1)
RANGES: dict[torch.dtype, Interval] = {
    torch.bool: (0, 1), torch.uint8: (0, 255), torch.int8: (-128, 127), torch.int16: (-(1 << 15), (1 << 15) - 1),
    torch.int32: INT32, torch.int64: INT64,
}  # fmt: skip
LARGEST = (1 << 31) - 1
"""Indices at most, where nobody said how many there are."""


@dataclass(frozen=True, eq=False)
class Value:
    """A variable of the program, or a literal."""

    name: str
    kind: str
    """f(loat), d(ouble), i(nt), l(ong) or b(ool)."""
    deps: frozenset[str] = frozenset()
    """Which of s, b, h, q, k it varies with."""
    literal: float | int | bool | None = None
    interval: Interval = INT64
    """What an integer lies in: where that is 32 bits, 32 are counted with."""


Arg = Value | float | int | bool


@dataclass(frozen=True, eq=False)
class Op:
    """`out = name(*args)`; a load also names its table."""

    name: str
    args: tuple[Value, ...]
    out: Value
    table: int = -1


@dataclass(frozen=True, eq=False)
class Table:
    """A captured tensor, or a view of one; held weakly, since programs are kept longer than a call lasts."""

    base: "weakref.ref[Tensor]"
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    requires_grad: bool
    views: tuple[Callable[[Tensor], Tensor], ...] = ()

    @classmethod
    def of(cls, x: Tensor) -> "Table":
        return cls(weakref.ref(x), x.dtype, tuple(x.shape), x.stride(), x.requires_grad)

    def viewed(self, view: Callable[[Tensor], Tensor], stops: bool = False) -> "Table":
        """A view of it (`stops`: one that passes no gradient)."""
        x = self.tensor()
        assert x is not None
        y = view(x.detach())
        learns = self.requires_grad and not stops
        return Table(self.base, y.dtype, tuple(y.shape), y.stride(), learns, (*self.views, view))

    def tensor(self) -> Tensor | None:
        """The tensor, unless it has ended."""
        x = self.base()
        if x is None:
            return None
        for view in self.views:
            x = view(x)
        return x

    @property
    def wide(self) -> bool:
        """Whether its elements, or those of a dense tensor of its shape, need 64 bits to be numbered."""
        reach = sum((n - 1) * abs(step) for n, step in zip(self.shape, self.stride, strict=True) if n)
        return max(reach, math.prod(self.shape)) > INT32[1]


# How each operation reads in Triton, and, where Python knows it, what it does to literals.
SPELLING: dict[str, str] = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}",
    "abs": "tl.abs({0})", "exp": "tl.exp({0})", "exp2": "tl.exp2({0})", "log": "tl.log({0})", "log2": "tl.log2({0})",
    "log1p": "log1p({0})", "pow": "tl.exp2({1} * tl.log2({0}))",
    "sqrt": "tl.sqrt({0})", "sin": "tl.sin({0})", "cos": "tl.cos({0})", "erf": "tl.erf({0})", "tanh": "tanh({0})",
    "sigmoid": "sigmoid({0})", "floor": "tl.floor({0})", "ceil": "tl.ceil({0})",
    "maximum": "tl.maximum({0}, {1})", "minimum": "tl.minimum({0}, {1})", "where": "tl.where({0}, {1}, {2})",
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "shift": "{0} >> {1}", "shift left": "{0} << {1}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}",
    "not": "{0} == 0", "stop": "{0}",
    "floordiv": "floor_divide({0}, {1})", "mod": "floor_mod({0}, {1})",
    "float": "({0}).to(tl.float32)", "double": "({0}).to(tl.float64)", "int": "({0}).to(tl.int32)",
    "long": "({0}).to(tl.int64)", "bool": "{0} != 0",
}  # fmt: skip
FOLD: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": np.true_divide, "neg": operator.neg,
    "abs": abs, "exp": np.exp, "exp2": np.exp2, "log": np.log, "log2": np.log2, "log1p": np.log1p, "pow": np.float_power,
    "sqrt": np.sqrt, "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "maximum": np.fmax, "minimum": np.fmin,
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "floordiv": operator.floordiv, "mod": operator.mod, "float": float, "double": float, "int": int, "long": int,
    "bool": bool, "floor": np.floor, "ceil": np.ceil, "not": operator.not_, "and": operator.and_, "or": operator.or_,
    "xor": operator.xor, "shift": operator.rshift, "shift left": operator.lshift,
}  # fmt: skip
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "not", "bool"}
FLOATS = {"div", "exp", "exp2", "log", "log2", "log1p", "pow", "sqrt", "sin", "cos", "erf", "tanh", "sigmoid"}
CONVERSIONS = {"float": "f", "double": "d", "int": "i", "long": "l"}
ARITHMETIC = {"add", "sub", "mul", "neg", "floordiv", "mod", "shift", "shift left"}


def literal(x: float | int | bool) -> Value:
    """A constant, spelled as Triton reads it."""
    kind = "b" if isinstance(x, bool) else "i" if isinstance(x, int) else "f"
    if kind == "i" and not within((int(x), int(x)), INT32):
        kind = "l"
    name = f'float("{x}")' if isinstance(x, float) and not math.isfinite(x) else repr(x)
    interval = INT64 if kind == "f" else (int(x), int(x))
    return Value(f"({name})" if name.startswith("-") else name, kind, frozenset(), x, interval)


def within(x: Interval, limits: Interval) -> bool:
    return limits[0] <= x[0] and x[1] <= limits[1]


def interval_of(name: str, args: tuple[Value, ...]) -> Interval | None:
    """What an operation on integers gives, as far as what its operands lie in tells; None where it tells nothing."""
    (lo, hi), *others = (a.interval for a in args)
    (low, high) = others[-1] if others else (lo, hi)
    corners: list[int]
    match name:
        case "add":
            return lo + low, hi + high
        case "sub":
            return lo - high, hi - low
        case "mul":
            corners = [lo * low, lo * high, hi * low, hi * high]
        case "neg":
            return -hi, -lo
        case "abs":
            return 0 if lo <= 0 <= hi else min(abs(lo), abs(hi)), max(abs(lo), abs(hi))
        case "maximum":
            return max(lo, low), max(hi, high)
        case "minimum":
            return min(lo, low), min(hi, high)
        case "where":
            (lo, hi), (low, high) = others
            return min(lo, low), max(hi, high)
        case "and" if lo >= 0 or low >= 0:
            return 0, min(x for x, y in ((hi, lo), (high, low)) if y >= 0)
        case "or" | "xor" if lo >= 0 and low >= 0:
            return 0, (1 << max(hi, high).bit_length()) - 1
        case "floordiv" if low == high and low > 0:
            return lo // low, hi // low
        case "mod" if low == high and low > 0:
            return (lo, hi) if lo >= 0 and hi < low else (0, low - 1)
        case "shift" if low >= 0 and high < 64:
            corners = [lo >> low, lo >> high, hi >> low, hi >> high]
        case "shift left" if low >= 0 and high < 64:
            corners = [lo << low, lo << high, hi << low, hi << high]
        case "int" | "long":
            return lo, hi
        case _:
            return None
    return min(corners), max(corners)


@dataclass
class Program:
    """Operations in order, the captured tensors that they read, and the result."""

    ops: list[Op] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    result: Value | None = None

    def value(self, name: str, *args: Arg, dtype: torch.dtype = torch.int64) -> Value:
        """Append `name(*args)` and return its variable; literals are folded.

        Args:
            dtype: that PyTorch gives it, if it is an integer: narrow ones wrap as PyTorch's do.
        """
        operands = tuple(a if isinstance(a, Value) else literal(a) for a in args)
        if name in ("floor", "ceil") and operands[0].kind not in "fd":
            return operands[0]
        if name in FOLD and all(a.literal is not None for a in operands):
            with np.errstate(all="ignore"):
                folded = FOLD[name](*(a.literal for a in operands))
            return literal(folded.item() if isinstance(folded, np.generic) else folded)
        if name == "float" and self._gap(operands[0]):
            # Between floats a difference of indices takes one instruction an element: its sides are vectors.
            op = next(op for op in self.ops if op.out is operands[0])
            return self.value(op.name, *(self.value("float", a) for a in op.args))
        kinds = {a.kind for a in (operands[1:] if name == "where" else operands)}
        real = "d" if "d" in kinds else "f" if "f" in kinds else ""
        if name in FLOATS or (real and name in ("add", "sub", "mul")):
            to = "double" if real == "d" else "float"
            operands = tuple(
                self.value(to, a) if a.kind in "il" or (a.kind == "b" and name in FLOATS) else a for a in operands
            )
        if name == "floordiv" and real:
            return self.value("floor", self.value("div", *operands))
        if name == "mod" and real:
            return self.value("sub", operands[0], self.value("mul", self.value("floordiv", *operands), operands[1]))
        # Triton's arithmetic on booleans is logic: count them as integers first.
        if name in ARITHMETIC:
            operands = tuple(self.value("int", a) if a.kind == "b" and a.literal is None else a for a in operands)
        if name in COMPARISONS or (name in ("and", "or", "xor", "where") and kinds == {"b"}):
            kind, interval = "b", (0, 1)
        elif name in ("float", "double") or (real and name not in CONVERSIONS) or name in FLOATS:
            kind, interval = CONVERSIONS.get(name, real or "f"), INT64
        else:
            return self._integer(name, operands, dtype, bool(real))
        return self._append(name, operands, kind, interval)

    def _append(self, name: str, operands: tuple[Value, ...], kind: str, interval: Interval) -> Value:
        deps: frozenset[str] = frozenset().union(*(a.deps for a in operands))
        out = Value(f"v{len(self.ops)}", kind, deps, None, interval)
        self.ops.append(Op(name, operands, out))
        return out

    def _integer(self, name: str, operands: tuple[Value, ...], dtype: torch.dtype, real: bool) -> Value:
        """An integer's operation, in 64 bits where the result or an operand does not fit into 32."""
        limits = RANGES[{"int": torch.int32}.get(name, dtype)]
        interval = None if real else interval_of(name, operands)
        if interval is None or not within(interval, limits):
            interval = limits
        if name in CONVERSIONS:
            if name == "long" and within(interval, INT32) and operands[0].kind in "ib":
                return operands[0] if operands[0].kind == "i" else self._append("int", operands, "i", interval)
            return self._append(name, operands, CONVERSIONS[name], interval)
        if name in ("floordiv", "mod"):
            # Python's rounding down is what a shift and a bit mask do, for powers of two without a division.
            divisor = operands[1].literal
            if isinstance(divisor, int) and divisor > 0 and divisor & (divisor - 1) == 0:
                whole = name == "floordiv"
                return self.value(
                    "shift" if whole else "and",
                    operands[0],
                    divisor.bit_length() - 1 if whole else divisor - 1,
                    dtype=dtype,
                )
        wide = dtype == torch.int64 and not within(interval, INT32)
        if not wide and all(a.kind != "l" for a in operands):
            return self._append(name, operands, "i", interval)
        first = 1 if name == "where" else 0
        widened = (
            a if a.kind == "l" or a.literal is not None or i < first else self._append("long", (a,), "l", a.interval)
            for i, a in enumerate(operands)
        )
        out = self._append(name, tuple(widened), "l", interval)
        return out if wide else self._append("int", (out,), "i", interval)

    def _gap(self, x: Value) -> bool:
        """Whether x varies with q and k as sums of indices do: exactly in floats too, of indices below 2**24."""
        if x.literal is not None or x.name in INPUTS or not within(x.interval, (-(1 << 24), 1 << 24)):
            return False
        op = next(op for op in self.ops if op.out is x)
        return op.name in ("add", "sub", "neg", "abs") and all(
            within(a.interval, (-(1 << 24), 1 << 24)) and (a.literal is not None or a.name in INPUTS or self._gap(a))
            for a in op.args
        )

    def load(self, table: Table, indices: tuple[Value, ...]) -> Value:
        """Append a read of one element of a captured tensor."""
        known = [
            i
            for i, t in enumerate(self.tables)
            if t is table or (t.base() is table.base() and not t.views and not table.views)
        ]
        if not known:
            self.tables.append(table)
        kind = {torch.float64: "d", torch.bool: "b", torch.int64: "l"}.get(table.dtype) or (
            "f" if table.dtype.is_floating_point else "i"
        )
        deps: frozenset[str] = frozenset().union(*(i.deps for i in indices))
        out = Value(f"v{len(self.ops)}", kind, deps, None, RANGES.get(table.dtype, INT64))
        self.ops.append(Op("load", indices, out, known[0] if known else len(self.tables) - 1))
        return out

    def tensors(self) -> tuple[Tensor, ...] | None:
        """The captured tensors, unless one has ended."""
        found = tuple(t.tensor() for t in self.tables)
        return None if any(x is None for x in found) else found  # type: ignore[return-value]


def _where(p: Program, condition: Value, yes: Arg, no: Arg) -> Value:
    return p.value("where", condition, yes, no)


def _tanh(p: Program, op: Op, g: Value) -> list[Value | None]:
    return [p.value("mul", g, p.value("sub", 1.0, p.value("mul", op.out, op.out)))]


def _div(p: Program, op: Op, g: Value) -> list[Value | None]:
    a = p.value("div", g, op.args[1])
    return [a, p.value("neg", p.value("mul", a, op.out))]


def _pow(p: Program, op: Op, g: Value) -> list[Value | None]:
    exponent = op.args[1].literal
    assert exponent is not None
    less = p.value("pow", op.args[0], float(exponent - 1))
    return [p.value("mul", g, p.value("mul", less, float(exponent))), None]


def _sigmoid(p: Program, op: Op, g: Value) -> list[Value | None]:
    return [p.value("mul", g, p.value("mul", op.out, p.value("sub", 1.0, op.out)))]


def _erf(p: Program, op: Op, g: Value) -> list[Value | None]:
    x = op.args[0]
    return [
        p.value("mul", g, p.value("mul", 2 / math.sqrt(math.pi), p.value("exp", p.value("neg", p.value("mul", x, x)))))
    ]


def _extreme(comparison: str) -> Callable[[Program, Op, Value], list[Value | None]]:
    def rule(p: Program, op: Op, g: Value) -> list[Value | None]:
        # At a tie each side takes half, as torch does.
        a, b = op.args
        half = p.value("mul", g, 0.5)
        tie = p.value("eq", a, b)
        wins = p.value(comparison, a, b)
        return [_where(p, tie, half, _where(p, wins, g, 0.0)), _where(p, tie, half, _where(p, wins, 0.0, g))]

    return rule


def _abs(p: Program, op: Op, g: Value) -> list[Value | None]:
    x = op.args[0]
    return [_where(p, p.value("gt", x, 0.0), g, _where(p, p.value("lt", x, 0.0), p.value("neg", g), 0.0))]


DERIVATIVES: dict[str, Callable[[Program, Op, Value], list[Value | None]]] = {
    "add": lambda p, op, g: [g, g],
    "sub": lambda p, op, g: [g, p.value("neg", g)],
    "mul": lambda p, op, g: [p.value("mul", g, op.args[1]), p.value("mul", g, op.args[0])],
    "div": _div,
    "neg": lambda p, op, g: [p.value("neg", g)],
    "abs": _abs,
    "exp": lambda p, op, g: [p.value("mul", g, op.out)],
    "exp2": lambda p, op, g: [p.value("mul", p.value("mul", g, op.out), math.log(2))],
    "log": lambda p, op, g: [p.value("div", g, op.args[0])],
    "log2": lambda p, op, g: [p.value("div", p.value("mul", g, 1 / math.log(2)), op.args[0])],
    "sqrt": lambda p, op, g: [p.value("div", p.value("mul", g, 0.5), op.out)],
    "sin": lambda p, op, g: [p.value("mul", g, p.value("cos", op.args[0]))],
    "cos": lambda p, op, g: [p.value("neg", p.value("mul", g, p.value("sin", op.args[0])))],
    "erf": _erf,
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "log1p": lambda p, op, g: [p.value("div", g, p.value("add", 1.0, op.args[0]))],
    "pow": _pow,
    "stop": lambda p, op, g: [None],
    "floor": lambda p, op, g: [None],
    "ceil": lambda p, op, g: [None],
    "maximum": _extreme("gt"),
    "minimum": _extreme("lt"),
    "where": lambda p, op, g: [None, _where(p, op.args[0], g, 0.0), _where(p, op.args[0], 0.0, g)],
    "float": lambda p, op, g: [g],
    "double": lambda p, op, g: [g],
}


@dataclass(frozen=True, eq=False)
class TableGradient:
    """`table[indices] += value`."""

    table: int
    indices: tuple[Value, ...]
    value: Value


def differentiate(program: Program, score: Value, g: Value) -> tuple[Value, list[TableGradient]]:
    """Append the reverse pass of `program` (result's cotangent `g`) to it.

    Returns:
        The score's cotangent, and what each captured tensor that requires gradients receives.
    """
    assert program.result is not None
    wanted = {score.name} | {
        op.out.name for op in program.ops if op.name == "load" and program.tables[op.table].requires_grad
    }
    forward = list(program.ops)
    reached = set(wanted)
    for op in forward:
        if op.out.kind in "fd" and any(a.name in reached for a in op.args) and op.name != "load":
            reached.add(op.out.name)
    cotangents: dict[str, Value] = {program.result.name: g}

    def add(to: Value, what: Value | None) -> None:
        if what is not None and to.name in reached:
            have = cotangents.get(to.name)
            cotangents[to.name] = what if have is None else program.value("add", have, what)

    gradients = []
    for op in reversed(forward):
        have = cotangents.get(op.out.name)
        if have is None or op.out.name not in reached:
            continue
        if op.name == "load":
            gradients.append(TableGradient(op.table, op.args, have))
            continue
        for arg, what in zip(op.args, DERIVATIVES[op.name](program, op, have), strict=True):
            add(arg, what)
    return cotangents.get(score.name, literal(0.0)), gradients
