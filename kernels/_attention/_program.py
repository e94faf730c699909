"""A straight-line program of scalar operations: what a score or mask does to one element, and its derivative.

Built from a trace (`_trace.py`), printed as a Triton function (`_codegen.py`).
"""

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor

INPUTS = ("b", "h", "q", "k", "off")
"""Batch entry or sequence, query head, query index, key index, Sk - Sq."""


@dataclass(frozen=True, eq=False)
class Value:
    """A variable of the program, or a literal."""

    name: str
    kind: str
    """f(loat), i(nt) or b(ool)."""
    deps: frozenset[str] = frozenset()
    """Which of s, b, h, q, k it varies with."""
    literal: float | int | bool | None = None


Arg = Value | float | int | bool


@dataclass(frozen=True, eq=False)
class Op:
    """`out = name(*args)`; a load also names its table."""

    name: str
    args: tuple[Value, ...]
    out: Value
    table: int = -1


# How each operation reads in Triton, and, where Python knows it, what it does to literals.
SPELLING: dict[str, str] = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}", "neg": "-{0}",
    "abs": "tl.abs({0})", "exp": "tl.exp({0})", "exp2": "tl.exp2({0})", "log": "tl.log({0})", "log2": "tl.log2({0})",
    "sqrt": "tl.sqrt({0})", "sin": "tl.sin({0})", "cos": "tl.cos({0})", "erf": "tl.erf({0})", "tanh": "tanh({0})",
    "sigmoid": "sigmoid({0})", "floor": "tl.floor({0})", "ceil": "tl.ceil({0})",
    "maximum": "tl.maximum({0}, {1})", "minimum": "tl.minimum({0}, {1})", "where": "tl.where({0}, {1}, {2})",
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}", "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "shift": "{0} >> {1}", "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "{0} == 0",
    "floordiv": "floor_divide({0}, {1})", "mod": "floor_mod({0}, {1})",
    "float": "({0}).to(tl.float32)", "int": "({0}).to(tl.int32)", "bool": "{0} != 0",
}  # fmt: skip
FOLD: dict[str, Callable[..., float]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv, "neg": operator.neg,
    "abs": abs, "exp": math.exp, "log": math.log, "sqrt": math.sqrt, "sin": math.sin, "cos": math.cos,
    "tanh": math.tanh, "maximum": max, "minimum": min, "eq": operator.eq, "ne": operator.ne, "lt": operator.lt,
    "le": operator.le, "gt": operator.gt, "ge": operator.ge, "floordiv": operator.floordiv, "mod": operator.mod,
    "float": float, "int": int, "bool": bool, "floor": math.floor, "ceil": math.ceil, "not": operator.not_,
    "and": operator.and_, "or": operator.or_,
}  # fmt: skip
COMPARISONS = {"eq", "ne", "lt", "le", "gt", "ge", "not", "bool"}
FLOATS = {"div", "exp", "exp2", "log", "log2", "sqrt", "sin", "cos", "erf", "tanh", "sigmoid", "float"}


def literal(x: float | int | bool) -> Value:
    """A constant, spelled as Triton reads it."""
    kind = "b" if isinstance(x, bool) else "i" if isinstance(x, int) else "f"
    name = f'float("{x}")' if isinstance(x, float) and not math.isfinite(x) else repr(x)
    return Value(f"({name})" if name.startswith("-") else name, kind, frozenset(), x)


@dataclass
class Program:
    """Operations in order, the captured tensors that they read, and the result."""

    ops: list[Op] = field(default_factory=list)
    tables: list[Tensor] = field(default_factory=list)
    result: Value | None = None

    def value(self, name: str, *args: Arg) -> Value:
        """Append `name(*args)` and return its variable; literals are folded."""
        operands = tuple(a if isinstance(a, Value) else literal(a) for a in args)
        if name in FOLD and all(a.literal is not None for a in operands):
            return literal(FOLD[name](*(a.literal for a in operands)))
        if name == "float" and self._gap(operands[0]):
            # Between floats a difference of indices takes one instruction an element: its sides are vectors.
            op = next(op for op in self.ops if op.out is operands[0])
            return self.value(op.name, *(self.value("float", a) for a in op.args))
        kinds = {a.kind for a in (operands[1:] if name == "where" else operands)}
        if name in ("add", "sub", "mul") and kinds == {"i", "f"}:
            operands = tuple(self.value("float", a) if a.kind == "i" else a for a in operands)
        if name in COMPARISONS or (name in ("and", "or", "xor") and kinds == {"b"}):
            kind = "b"
        elif name != "int" and (name in FLOATS or "f" in kinds):
            kind = "f"
        else:
            kind = "b" if name == "where" and kinds == {"b"} else "i"
        if name == "floordiv" and "f" in kinds:
            return self.value("floor", self.value("div", *operands))
        if name == "mod" and "f" in kinds:
            return self.value("sub", operands[0], self.value("mul", self.value("floordiv", *operands), operands[1]))
        if name in ("floordiv", "mod") and operands[0].kind == "i":
            # Python's rounding down is what a shift and a bit mask do, for powers of two without a division.
            divisor = operands[1].literal
            if isinstance(divisor, int) and divisor > 0 and divisor & (divisor - 1) == 0:
                whole = name == "floordiv"
                return self.value(
                    "shift" if whole else "and", operands[0], divisor.bit_length() - 1 if whole else divisor - 1
                )
        # Triton's arithmetic on booleans is logic: count them as integers first.
        if name in ("add", "sub", "mul", "neg", "floordiv", "mod"):
            operands = tuple(self.value("int", a) if a.kind == "b" and a.literal is None else a for a in operands)
        if name in FLOATS - {"float"}:
            operands = tuple(self.value("float", a) if a.kind != "f" else a for a in operands)
        deps = frozenset().union(*(a.deps for a in operands))
        out = Value(f"v{len(self.ops)}", kind, deps)
        self.ops.append(Op(name, operands, out))
        return out

    def _gap(self, x: Value) -> bool:
        """Whether x varies with q and k as sums of indices do: exactly in floats too, below 2**24 tokens."""
        if x.literal is not None or x.name in INPUTS:
            return False
        op = next(op for op in self.ops if op.out is x)
        return op.name in ("add", "sub", "neg", "abs") and all(
            a.literal is not None or a.name in INPUTS or self._gap(a) for a in op.args
        )

    def load(self, table: Tensor, indices: tuple[Value, ...]) -> Value:
        """Append a read of one element of a captured tensor."""
        known = [i for i, t in enumerate(self.tables) if t is table]
        if not known:
            self.tables.append(table)
        kind = "f" if table.is_floating_point() else "b" if str(table.dtype) == "torch.bool" else "i"
        deps = frozenset().union(*(i.deps for i in indices))
        out = Value(f"v{len(self.ops)}", kind, deps)
        self.ops.append(Op("load", indices, out, known[0] if known else len(self.tables) - 1))
        return out


def _where(p: Program, condition: Value, yes: Arg, no: Arg) -> Value:
    return p.value("where", condition, yes, no)


def _tanh(p: Program, op: Op, g: Value) -> list[Value | None]:
    return [p.value("mul", g, p.value("sub", 1.0, p.value("mul", op.out, op.out)))]


def _div(p: Program, op: Op, g: Value) -> list[Value | None]:
    a = p.value("div", g, op.args[1])
    return [a, p.value("neg", p.value("mul", a, op.out))]


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
    "floor": lambda p, op, g: [None],
    "ceil": lambda p, op, g: [None],
    "maximum": _extreme("gt"),
    "minimum": _extreme("lt"),
    "where": lambda p, op, g: [None, _where(p, op.args[0], g, 0.0), _where(p, op.args[0], 0.0, g)],
    "float": lambda p, op, g: [g],
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
        if op.out.kind == "f" and any(a.name in reached for a in op.args) and op.name != "load":
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
