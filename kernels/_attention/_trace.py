"""From a score_mod or mask_mod to a `Program`: traced by torch.fx, operation by operation; what cannot be, is named."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trainkit.kernels._attention._program import Arg, Program, Table, Value, literal
from trainkit.kernels._attention._scalars import ScalarIndex

aten = torch.ops.aten

BINARY = {
    "mul": "mul", "maximum": "maximum", "minimum": "minimum", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le",
    "gt": "gt",
    "ge": "ge", "bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor", "floor_divide": "floordiv",
    "remainder": "mod",
}  # fmt: skip
SHIFTS = {
    "__rshift__": "shift", "bitwise_right_shift": "shift", "__lshift__": "shift left", "bitwise_left_shift": "shift left",
}  # fmt: skip
LOGICAL = {"logical_and": "and", "logical_or": "or", "logical_xor": "xor"}
UNARY = (
    "neg", "abs", "exp", "exp2", "log", "log2", "log1p", "sqrt", "sin", "cos", "tanh", "sigmoid", "erf", "floor", "ceil",
)  # fmt: skip
SAME = {
    "alias",
    "clone",
    "lift_fresh_copy",
    "view",
    "expand",
    "squeeze",
    "unsqueeze",
    "reshape",
    "positive",
    "contiguous",
}
CONSTANTS = {"scalar_tensor": 0, "full": 1, "full_like": 1, "new_full": 2}
ZEROS = {"zeros", "zeros_like", "new_zeros"}
ONES = {"ones", "ones_like", "new_ones"}
KINDS = {
    torch.bool: "bool", torch.float32: "float", torch.float64: "double", torch.int32: "int", torch.int64: "long",
}  # fmt: skip
VIEWS = {"alias", "detach", "permute", "transpose", "t", "squeeze", "unsqueeze", "slice", "select", "expand", "numpy_T"}
"""Of a captured tensor before it is indexed: what is taken of it anew in each call."""
HUGE = torch.finfo(torch.float32).max


@cache
def _simpler() -> dict[Any, Any]:
    """Operations that are traced as the simpler ones they are made of."""
    # Imported here: they take longer to load than all the rest of this package.
    from torch._decomp import get_decompositions

    names = ("gelu", "silu", "leaky_relu", "hardtanh", "softplus", "expm1", "addcmul", "lerp")
    return dict(get_decompositions([getattr(aten, name) for name in names]))


class Untraceable(ValueError):
    """A score_mod or mask_mod that no kernel can be made of; the message names the operation."""


class _View:
    """A captured tensor, the first dimensions of which are already indexed."""

    def __init__(self, table: Table, indices: tuple[Value, ...] = ()) -> None:
        self.table = table
        self.indices = indices


def _pow(p: Program, x: Value, exponent: Value) -> Value:
    n = exponent.literal
    if n == 0.5:
        return p.value("sqrt", x)
    if n == -0.5:
        return p.value("div", 1.0, p.value("sqrt", x))
    if n is not None and n == int(n) and abs(n) <= 8:
        out = x if n else literal(1.0)
        for _ in range(abs(int(n)) - 1):
            out = p.value("mul", out, x)
        return p.value("div", 1.0, out) if n < 0 else out
    if x.kind not in "fd" and exponent.kind not in "fd":
        if x.literal == 2:
            return p.value("shift left", 1, exponent)
        raise Untraceable(f"an integer's power may be up to 8, or of 2, got {x.literal} ** {exponent.name}: use floats")
    if n is not None and n != int(n):
        return p.value("pow", x, float(n))
    # A negative number has powers where the exponent is whole.
    size = p.value("exp2", p.value("mul", exponent, p.value("log2", p.value("abs", x))))
    half = p.value("div", exponent, 2.0)
    odd = p.value("ne", p.value("floor", half), half)
    if exponent.kind in "fd" and n is None:
        broken = p.value("ne", p.value("floor", exponent), exponent)
        size = p.value("where", p.value("and", p.value("lt", x, 0.0), broken), float("nan"), size)
    signed = p.value("where", p.value("and", p.value("lt", x, 0.0), odd), p.value("neg", size), size)
    return p.value("where", p.value("eq", exponent, 0.0), 1.0, signed)


def _number(x: Arg) -> Value:
    return x if isinstance(x, Value) else literal(x)


def _constant(x: float | int | bool, dtype: torch.dtype) -> Value:
    """A constant of a type: PyTorch converts what it fills with."""
    return literal(bool(x) if dtype == torch.bool else float(x) if dtype.is_floating_point else int(x))


def _lower(p: Program, name: str, args: list[Any], kwargs: dict[str, Any], dtype: torch.dtype) -> Arg:
    if name in ("add", "sub", "rsub"):
        a, b = args[:2]
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        a, b = (b, a) if name == "rsub" else (a, b)
        b = b if alpha == 1 else p.value("mul", b, alpha, dtype=dtype)
        return p.value("add" if name == "add" else "sub", a, b, dtype=dtype)
    if name in BINARY or name in SHIFTS:
        return p.value((BINARY | SHIFTS)[name], *args, dtype=dtype)
    if name in LOGICAL:
        return p.value(LOGICAL[name], *(p.value("bool", a) for a in args))
    if name in UNARY:
        return p.value(name, args[0], dtype=dtype)
    if name == "div":
        mode = kwargs.get("rounding_mode")
        if mode == "trunc":
            raise Untraceable("div with rounding_mode='trunc' has no kernel: use 'floor'")
        return p.value("floordiv" if mode == "floor" else "div", *args[:2], dtype=dtype)
    if name == "bitwise_not" and _number(args[0]).kind != "b":
        return p.value("sub", -1, args[0], dtype=dtype)
    if name in ("logical_not", "bitwise_not"):
        return p.value("not", args[0])
    if name == "where":
        return p.value("where", *args, dtype=dtype)
    if name == "masked_fill":
        return p.value("where", args[1], args[2], args[0], dtype=dtype)
    if name == "detach":
        return p.value("stop", args[0]) if _number(args[0]).kind in "fd" else args[0]  # type: ignore[no-any-return]
    if name in SAME:
        return args[0]  # type: ignore[no-any-return]
    if name in CONSTANTS:
        fill = args[CONSTANTS[name]]
        return fill if isinstance(fill, Value) else _constant(fill, dtype)
    if name in ZEROS or name in ONES:
        return _constant(name in ONES, dtype)
    if name == "isnan":
        return p.value("ne", args[0], args[0])
    if name in ("isinf", "isfinite"):
        size = p.value("abs", args[0])
        return p.value("eq", size, math.inf) if name == "isinf" else p.value("lt", size, math.inf)
    if name == "nan_to_num":
        if _number(args[0]).kind not in "fd":
            return args[0]  # type: ignore[no-any-return]
        nan, top, bottom = ((*args[1:], None, None, None)[i] for i in range(3))
        top, bottom = (HUGE if top is None else top), (-HUGE if bottom is None else bottom)
        x = args[0]
        finite = p.value(
            "where", p.value("eq", x, math.inf), top, p.value("where", p.value("eq", x, -math.inf), bottom, x)
        )
        return p.value("where", p.value("ne", x, x), nan or 0.0, finite)
    if name == "relu":
        return p.value("where", p.value("gt", args[0], 0.0), args[0], 0.0)
    if name in ("clamp", "clamp_min", "clamp_max"):
        low = args[1] if name != "clamp_max" and len(args) > 1 else kwargs.get("min")
        high = args[1] if name == "clamp_max" else args[2] if len(args) > 2 else kwargs.get("max")
        # Unlike maximum's, clamp's gradient is 1 at its edges.
        x = args[0]
        if low is not None:
            x = p.value("where", p.value("ge", x, low), x, low, dtype=dtype)
        return x if high is None else p.value("where", p.value("le", x, high), x, high, dtype=dtype)
    if name in ("pow", "square", "reciprocal"):
        return _pow(p, _number(args[0]), _number({"square": 2, "reciprocal": -1}.get(name, args[-1])))
    if name == "rsqrt":
        return p.value("div", 1.0, p.value("sqrt", args[0]))
    if name == "sign":
        x = args[0]
        return p.value("where", p.value("gt", x, 0.0), 1.0, p.value("where", p.value("lt", x, 0.0), -1.0, 0.0))
    if name == "_to_copy":
        if dtype in KINDS:
            return p.value(KINDS[dtype], args[0])
        raise Untraceable(f"a conversion to {dtype} has no kernel: use fp32, fp64, int32, int64 or bool")
    raise Untraceable(f"the operation aten.{name} has no kernel; take backend='reference', or write it with others")


def _captured(tensor: Tensor, device: torch.device) -> _View | Value:
    if tensor.device != device:
        if tensor.dim() == 0 and not tensor.requires_grad:
            return literal(tensor.item())
        raise Untraceable(
            f"a captured tensor must be on {device}, got {list(tensor.shape)} on {tensor.device}: move it"
        )
    if tensor.is_complex() or tensor.is_quantized:
        raise Untraceable(f"a captured tensor must hold real numbers, got {tensor.dtype}")
    return _View(Table.of(tensor))


def append(
    program: Program, function: Callable[..., Tensor], inputs: list[Value], device: torch.device, kind: str
) -> Value:
    """Trace a function of scalars and append its operations to `program`.

    Args:
        inputs: what the function's arguments are called in the program, and what they lie in.
        kind: of function, for messages.

    Raises:
        Untraceable: an operation that has no kernel, a branch on a value, or a result that is no scalar.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    # Indices are int64, as where vmap runs the function: what they are counted with is found from what they lie in.
    examples = [torch.zeros((), dtype=torch.float32 if v.kind == "f" else torch.int64, device=device) for v in inputs]
    try:
        # Tensors made in inference mode are captured as others are.
        with ScalarIndex(), torch.inference_mode(False), torch.no_grad():
            traced = make_fx(lambda *a: function(*a), decomposition_table=_simpler(), tracing_mode="real")(*examples)
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise Untraceable(f"{kind} cannot be traced ({line}): choose with torch.where, not with if") from error
    given = iter(inputs)
    env: dict[Any, Any] = {}

    def whole(x: Any) -> Any:
        """Turn a captured tensor that is used as a number into a load."""
        if isinstance(x, _View):
            if len(x.indices) != len(x.table.shape):
                raise Untraceable(f"{kind} may use captured tensors by element, got {list(x.table.shape)} as a whole")
            return program.load(x.table, x.indices)
        return x

    for node in traced.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            env[node] = _captured(getattr(traced, node.target), device)
        elif node.op == "output":
            out = whole(env[node.args[0]]) if node.args[0] in env else node.args[0]
            return out if isinstance(out, Value) else literal(out)
        else:
            env[node] = _operation(program, node, env, whole, kind)
    raise AssertionError("a graph has an output")


def _operation(p: Program, node: Any, env: dict[Any, Any], whole: Callable[[Any], Any], kind: str) -> _View | Value:
    """One call of the traced graph."""
    name = node.target.overloadpacket.__name__
    base = env.get(node.args[0]) if node.args and isinstance(node.args[0], torch.fx.Node) else None
    if isinstance(base, _View):
        if name == "lift_fresh_copy" and not base.table.shape and (x := base.table.tensor()) is not None:
            # A constant that the function writes down.
            return literal(x.item())
        first = name == "select" and node.args[1] == 0
        if name in VIEWS and not base.indices and not first and base.table.shape:
            rest, named = node.args[1:], dict(node.kwargs)
            return _View(base.table.viewed(lambda x: node.target(x, *rest, **named), name == "detach"))
        if name in ("index", "select"):
            picks = node.args[1] if name == "index" else [node.args[2]]
            if None in picks or (name == "select" and not first):
                raise Untraceable(
                    f"{kind} may index captured tensors from the first dimension on, got {node.format_node()}"
                )
            values = tuple(whole(env[i]) if i in env else literal(i) for i in picks)
            return _View(base.table, base.indices + values)
        if name in SAME:
            return base
    args = [whole(env[a]) if isinstance(a, torch.fx.Node) else a for a in node.args]
    example = node.meta.get("val")
    dtype = example.dtype if isinstance(example, Tensor) else torch.int64
    out = _lower(p, name, args, dict(node.kwargs), dtype)
    return out if isinstance(out, Value) else literal(out)
