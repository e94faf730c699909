"""Hooks of query, key and output: a function of one element and its RoPE partner, as one pass over the tensor.

Loading a tile of keys happens once for each tile of queries: a key's hook runs before, once, instead of in every load.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainkit.kernels._attention import _codegen
from trainkit.kernels._attention._captures import remembered
from trainkit.kernels._attention._program import LARGEST, Program, Table, Value, differentiate
from trainkit.kernels._attention._scalars import ScalarIndex
from trainkit.kernels._attention._spec import Packed
from trainkit.kernels._attention._trace import Untraceable, append
from trainkit.kernels._grid import flat
from trainkit.kernels._once import only_once
from trainkit.kernels.fused._launch import fusible, on
from trainkit.kernels.fused._rope import reference as rotate
from trainkit.kernels.fused._rope import rope as fused_rope
from trainkit.kernels.fused._rope import rotated

Hook = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
"""`hook(x, pair, b, h, idx, d)`; `pair` is the element at `(d + D / 2) % D` of the same row."""
Rope = tuple[Tensor, Tensor]


def rows_of(x: Tensor, cu: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of each row of `[B, S, ...]`, packed by `cu` or not: its batch entry or sequence, and its index there, `[B * S]`."""
    B, S = x.shape[:2]
    at = torch.arange(B * S, device=x.device, dtype=torch.int32)
    if cu is None:
        return at // S, at % S
    sequence = torch.searchsorted(cu, at, right=True, out_int32=True) - 1
    return sequence, at - cu[sequence]


def rope_hook(rope: Rope, offset: int | Tensor) -> Hook:
    """Rotary positions (Su et al., RoFormer, section 3.2; halves paired): row `idx + offset` of the tables turns a token.

    Args:
        rope: (cos, sin), `[positions, D / 2]`.
        offset: of every sequence, or int32 `[sequences]`.
    """
    cos, sin = rope
    half = cos.shape[1]

    def shared(x: Tensor, pair: Tensor, b: Tensor, h: Tensor, idx: Tensor, d: Tensor) -> Tensor:
        return x * cos[idx + offset, d % half] + torch.where(d < half, -pair, pair) * sin[idx + offset, d % half]

    def own(x: Tensor, pair: Tensor, b: Tensor, h: Tensor, idx: Tensor, d: Tensor) -> Tensor:
        at = idx + offset[b]  # type: ignore[index]
        return x * cos[at, d % half] + torch.where(d < half, -pair, pair) * sin[at, d % half]

    return own if isinstance(offset, Tensor) else shared


def check_rope(rope: Rope, q: Tensor, k: Tensor, packed: Packed | None) -> None:
    """Refuse tables that are no `[positions, D / 2]` pair with a row for every key, or more queries than keys.

    Raises:
        ValueError: with the rule and the value got.
    """
    cos, sin = rope
    D = q.shape[3]
    bounds = ((0, q.shape[1]), (0, k.shape[1])) if packed is None else (packed.bounds_q, packed.bounds_k)
    queries, keys = ([b - a for a, b in pairwise(x)] for x in bounds)
    need = max(keys, default=0)
    if D % 2 or cos.dim() != 2 or cos.shape != sin.shape or cos.shape[1] != D // 2 or cos.shape[0] < need:
        raise ValueError(
            f"rope must be (cos, sin) of [at least {need} positions, {D}/2] for an even head_dim,"
            f" got {list(cos.shape)} and {list(sin.shape)}"
        )
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("rope's tables must not require gradients, got ones that do: detach them")
    # The first of more queries than keys would stand before position 0.
    for n, m in zip(queries, keys, strict=True):
        if n > m:
            raise ValueError(
                f"rope needs a position for each query, so at most as many queries as keys, got {n} and {m}"
            )


def rope_offset(q: Tensor, k: Tensor, cu_q: Tensor | None, cu_k: Tensor | None) -> int | Tensor:
    """What a query's index lacks to its position: the last query stands at the last key."""
    if cu_q is None or cu_k is None:
        return k.shape[1] - q.shape[1]
    return (cu_k[1:] - cu_k[:-1]) - (cu_q[1:] - cu_q[:-1])


def rows_at(rope: Rope, offset: int, x: Tensor) -> Rope:
    """The tables' rows for the tokens of a sequence that is not packed."""
    rows = slice(offset, offset + x.shape[1])
    return rope[0][rows], rope[1][rows]


def apply_rope(x: Tensor, rope: Rope, offset: int | Tensor, cu: Tensor | None, plain: bool) -> Tensor:
    """Turn `[B, S, H, D]`, in the rope kernel where sequences are not packed; differentiable in x."""
    if cu is None and isinstance(offset, int) and not plain:
        return fused_rope(x, *rows_at(rope, offset, x))
    return apply(x, rope_hook(rope, offset), cu, plain)


def rope_formula(x: Tensor, rope: Rope, offset: int | Tensor, cu: Tensor | None) -> Tensor:
    """What `rope_hook` does, as plain PyTorch for a compiler to fuse."""
    if cu is None and isinstance(offset, int):
        return rotate(x, *rows_at(rope, offset, x))
    sequence, index = rows_of(x, cu)
    at = index + (offset[sequence] if isinstance(offset, Tensor) else offset)
    cos, sin = (t[at].view(*x.shape[:2], -1) for t in rope)
    return rotate(x, cos, sin)


@dataclass(frozen=True, eq=False)
class Compiled:
    """A traced hook: its program, the derivatives by the element and by its partner, and the printed functions."""

    program: Program
    text: str
    module: Any

    @property
    def tables(self) -> list[Table]:
        return self.program.tables


class Captured(NamedTuple):
    """A hook of one call: traced, and the tensors that it captured."""

    compiled: Compiled
    tables: tuple[Tensor, ...]


def trace(hook: Hook, device: torch.device) -> Captured:
    """Trace and differentiate a hook, once as long as what it captures stays.

    Raises:
        Untraceable: an operation without a kernel, or a captured tensor that requires gradients.
    """
    compiled: Compiled = remembered(device, [hook], (), lambda: _trace(hook, device))
    tables = compiled.program.tensors()
    if tables is None:
        # The hook made one itself, which has ended.
        compiled = _trace(hook, device)
        tables = compiled.program.tensors()
    assert tables is not None
    return Captured(compiled, tables)


def _trace(hook: Hook, device: torch.device) -> Compiled:
    x, pair, g = (Value(n, "f", frozenset("s")) for n in ("x", "pair", "g"))
    ints = [Value(n, "i", frozenset({n}), None, (0, LARGEST)) for n in ("b", "h", "q", "k")]
    texts = []
    # One program for the value, one for each derivative: what differentiate appends serves one input.
    for name, by in (("hook", None), ("by_x", x), ("by_pair", pair)):
        program = Program()
        result = append(program, hook, [x, pair, *ints], device, "a hook")
        program.result = result if result.kind == "f" else program.value("float", result)
        if any(t.requires_grad for t in program.tables) and torch.is_grad_enabled():
            shapes = [list(t.shape) for t in program.tables if t.requires_grad]
            raise Untraceable(
                f"tensors that a hook captures get no gradients, got {shapes} that require them: detach them"
            )
        if by is not None:
            program.result, _ = differentiate(program, by, g)
        texts.append((name, program))
    text = _codegen.hook_source(texts)
    return Compiled(texts[0][1], text, _codegen.load(text))


def _run(hook: Captured, x: Tensor, g: Tensor | None, cu: Tensor | None) -> Tensor:
    import triton

    from trainkit.kernels._attention import _triton_hooks

    x = x if x.stride(-1) == 1 else x.contiguous()
    g = g if g is None or g.stride(-1) == 1 else g.contiguous()
    B, S, H, D = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        sequence, index = (None, None) if cu is None else rows_of(x, cu)
        other = x if g is None else g
        module = hook.compiled.module
        with on(x):
            _triton_hooks.transform[flat((B * S,))](
            x, other, y, sequence, index, *x.stride()[:3], *other.stride()[:3], S, H, _codegen.arguments(hook.tables),
            D=D, BD=triton.next_power_of_2(D), BH=min(triton.next_power_of_2(H), 16), BACKWARD=g is not None,
            PACKED=cu is not None, HOOK=module.hook, BY_X=module.by_x, BY_PAIR=module.by_pair,
        )  # fmt: skip
    return y


class _Transform(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, hook: Captured, cu: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, cu, *hook.tables)
        ctx.compiled = hook.compiled
        return _run(hook, x, None, cu)

    @staticmethod
    @only_once("a hook of attention")
    def backward(ctx: Any, *grads: Any) -> Any:
        x, cu, *tables = ctx.saved_tensors
        return _run(Captured(ctx.compiled, tuple(tables)), x, grads[0], cu), None, None


def turn_queries(q: Tensor, k: Tensor, rope: Rope, packed: Packed | None, grad: Tensor | None = None) -> Tensor:
    """The queries turned as the Hopper forward turns them in its load; with `grad`, theirs before they were turned."""
    cu_q, cu_k = (None, None) if packed is None else (packed.cu_q, packed.cu_k)
    if packed is None:
        tables = rows_at(rope, k.shape[1] - q.shape[1], q)
        return rotated(q, *tables, 1) if grad is None else rotated(grad, *tables, -1)
    return _run(trace(rope_hook(rope, rope_offset(q, k, cu_q, cu_k)), q.device), q, grad, cu_q)


def reference(x: Tensor, hook: Hook, cu: Tensor | None) -> Tensor:
    """The hook at every element, in fp32 (fp64 for fp64 inputs)."""
    work = torch.promote_types(x.dtype, torch.float32)
    B, S, H, D = x.shape
    sequence, index = rows_of(x, cu)
    flat = x.to(work).reshape(B * S, H, D)
    function: Callable[..., Tensor] = hook
    for dims in ((0, 0, None, None, None, 0), (0, 0, None, 0, None, None), (0, 0, 0, None, 0, None)):
        function = torch.vmap(function, in_dims=dims)
    with ScalarIndex():
        out = function(
            flat,
            flat.roll(D // 2, -1),
            sequence,
            torch.arange(H, device=x.device),
            index,
            torch.arange(D, device=x.device),
        )
    return out.to(x.dtype).reshape(x.shape)


def apply(x: Tensor, hook: Hook, cu: Tensor | None, plain: bool) -> Tensor:
    """`hook` at every element of `[B, S, H, D]`, D even; differentiable in x.

    Args:
        cu: packed sequences' cumulative lengths.
        plain: without a kernel.

    Raises:
        ValueError: an odd D.
        Untraceable: what `trace` cannot lower.
    """
    if x.shape[3] % 2:
        raise ValueError(f"a hook pairs the halves of a head and needs an even head_dim, got {x.shape[3]}")
    if plain or not fusible(x):
        return reference(x, hook, cu) if x.numel() else x
    return _Transform.apply(x, trace(hook, x.device), cu)  # type: ignore[no-untyped-call, no-any-return]
