"""From a score_mod or mask_mod to a `Program`: traced by torch.fx, operation by operation; what cannot be, is named."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from trainkit.kernels._attention._program import Arg, Program, Value, literal
from trainkit.kernels._attention._scalars import ScalarIndex

aten = torch.ops.aten

BINARY = {
    "mul": "mul", "maximum": "maximum", "minimum": "minimum", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le",
    "gt": "gt",
    "ge": "ge", "bitwise_and": "and", "bitwise_or": "or", "bitwise_xor": "xor", "floor_divide": "floordiv",
    "remainder": "mod",
}  # fmt: skip
LOGICAL = {"logical_and": "and", "logical_or": "or", "logical_xor": "xor"}
UNARY = ("neg", "abs", "exp", "exp2", "log", "log2", "sqrt", "sin", "cos", "tanh", "sigmoid", "erf", "floor", "ceil")
SAME = {
    "alias", "clone", "detach", "lift_fresh_copy", "view", "expand", "squeeze", "unsqueeze", "reshape", "positive",
    "contiguous",
}  # fmt: skip
CONSTANTS = {"scalar_tensor": 0, "full": 1, "full_like": 1}
KINDS = {torch.bool: "bool", torch.float32: "float", torch.float64: "float", torch.int32: "int", torch.int64: "int"}


@cache
def _simpler() -> dict[Any, Any]:
    """Operations that are traced as the simpler ones they are made of."""
    # Imported here: they take longer to load than all the rest of this package.
    from torch._decomp import get_decompositions

    names = ("gelu", "silu", "leaky_relu", "hardtanh", "softplus", "log1p", "expm1", "addcmul", "lerp")
    return dict(get_decompositions([getattr(aten, name) for name in names]))


class Untraceable(ValueError):
    """A score_mod or mask_mod that no kernel can be made of; the message names the operation."""


class _View:
    """A captured tensor, the first dimensions of which are already indexed."""

    def __init__(self, table: Tensor, indices: tuple[Value, ...] = ()) -> None:
        self.table = table
        self.indices = indices


def _pow(p: Program, x: Value, exponent: Any) -> Value:
    if isinstance(exponent, int | float) and exponent in (1, 2, 3, 4, -1, 0.5, -0.5):
        if exponent == 0.5:
            return p.value("sqrt", x)
        if exponent == -0.5:
            return p.value("div", 1.0, p.value("sqrt", x))
        if exponent == -1:
            return p.value("div", 1.0, x)
        out = x
        for _ in range(int(exponent) - 1):
            out = p.value("mul", out, x)
        return out
    raise Untraceable(f"a power may be 1, 2, 3, 4, -1, 0.5 or -0.5, got {exponent}: write exp2(e * log2(x))")


def _lower(p: Program, name: str, args: list[Any], kwargs: dict[str, Any]) -> Arg:
    if name in ("add", "sub", "rsub"):
        a, b = args[:2]
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        a, b = (b, a) if name == "rsub" else (a, b)
        return p.value("add" if name == "add" else "sub", a, b if alpha == 1 else p.value("mul", b, alpha))
    if name in BINARY:
        return p.value(BINARY[name], *args)
    if name in LOGICAL:
        return p.value(LOGICAL[name], *(p.value("bool", a) for a in args))
    if name in UNARY:
        return p.value(name, args[0])
    if name == "div":
        mode = kwargs.get("rounding_mode")
        if mode == "trunc":
            raise Untraceable("div with rounding_mode='trunc' has no kernel: use 'floor'")
        return p.value("floordiv" if mode == "floor" else "div", *args[:2])
    if name in ("logical_not", "bitwise_not"):
        return p.value("not", args[0])
    if name == "where":
        return p.value("where", *args)
    if name in SAME:
        return args[0]  # type: ignore[no-any-return]
    if name in CONSTANTS:
        return literal(args[CONSTANTS[name]])
    if name in ("zeros_like", "zeros", "ones_like", "ones"):
        return literal(float(name.startswith("ones")))
    if name == "relu":
        return p.value("where", p.value("gt", args[0], 0.0), args[0], 0.0)
    if name in ("clamp", "clamp_min", "clamp_max"):
        low = args[1] if name != "clamp_max" and len(args) > 1 else kwargs.get("min")
        high = args[1] if name == "clamp_max" else args[2] if len(args) > 2 else kwargs.get("max")
        # Unlike maximum's, clamp's gradient is 1 at its edges.
        x = args[0]
        if low is not None:
            x = p.value("where", p.value("ge", x, low), x, low)
        return x if high is None else p.value("where", p.value("le", x, high), x, high)
    if name in ("pow", "square", "reciprocal"):
        return _pow(p, args[0], {"square": 2, "reciprocal": -1}.get(name, args[-1]))
    if name == "rsqrt":
        return p.value("div", 1.0, p.value("sqrt", args[0]))
    if name == "sign":
        x = args[0]
        return p.value("where", p.value("gt", x, 0.0), 1.0, p.value("where", p.value("lt", x, 0.0), -1.0, 0.0))
    if name == "_to_copy":
        dtype = kwargs.get("dtype")
        if dtype is None:
            return args[0]  # type: ignore[no-any-return]
        if dtype in KINDS:
            return p.value(KINDS[dtype], args[0])
        raise Untraceable(f"a conversion to {dtype} has no kernel: use fp32, int32 or bool")
    raise Untraceable(f"the operation aten.{name} has no kernel; take backend='reference', or write it with others")


def _captured(node: Any, tensor: Tensor, device: torch.device) -> _View | Value:
    if tensor.device != device:
        if tensor.dim() == 0 and not tensor.requires_grad:
            return literal(tensor.item())
        raise Untraceable(
            f"a captured tensor must be on {device}, got {list(tensor.shape)} on {tensor.device}: move it"
        )
    return _View(tensor)


def append(
    program: Program, function: Callable[..., Tensor], inputs: list[Value], device: torch.device, kind: str
) -> Value:
    """Trace a function of scalars and append its operations to `program`.

    Args:
        inputs: what the function's arguments are called in the program.
        kind: of function, for messages.

    Raises:
        Untraceable: an operation that has no kernel, a branch on a value, or a result that is no scalar.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    examples = [torch.zeros((), dtype=torch.float32 if v.kind == "f" else torch.int32, device=device) for v in inputs]
    try:
        with ScalarIndex(), torch.no_grad():
            traced = make_fx(lambda *a: function(*a), decomposition_table=_simpler(), tracing_mode="real")(*examples)
    except RuntimeError as error:
        line = str(error).splitlines()[0]
        raise Untraceable(f"{kind} cannot be traced ({line}): choose with torch.where, not with if") from error
    given = iter(inputs)
    env: dict[Any, Any] = {}

    def whole(x: Any) -> Any:
        """Turn a captured tensor that is used as a number into a load."""
        if isinstance(x, _View):
            if len(x.indices) != x.table.dim():
                raise Untraceable(f"{kind} may use captured tensors by element, got {list(x.table.shape)} as a whole")
            return program.load(x.table, x.indices)
        return x

    for node in traced.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "get_attr":
            env[node] = _captured(node, getattr(traced, node.target), device)
        elif node.op == "output":
            out = whole(env[node.args[0]]) if node.args[0] in env else node.args[0]
            return out if isinstance(out, Value) else literal(out)
        else:
            name = node.target.overloadpacket.__name__
            if name in ("index", "select"):
                base = env[node.args[0]]
                picks = node.args[1] if name == "index" else [node.args[2]]
                if not isinstance(base, _View) or None in picks or (name == "select" and node.args[1] != 0):
                    raise Untraceable(
                        f"{kind} may index captured tensors from the first dimension on, got {node.format_node()}"
                    )
                values = tuple(whole(env[i]) if i in env else literal(i) for i in picks)
                env[node] = _View(base.table, base.indices + values)
                continue
            if name in SAME and isinstance(env.get(node.args[0]), _View):
                env[node] = env[node.args[0]]
                continue
            args = [whole(env[a]) if isinstance(a, torch.fx.Node) else a for a in node.args]
            out = _lower(program, name, args, dict(node.kwargs))
            env[node] = out if isinstance(out, Value) else literal(out)
    raise AssertionError("a graph has an output")
