"""The Hopper path: Gluon kernels for bf16 and fp16 on compute capability 9, head_dim 64, 128 and 256."""

import math
import operator
from functools import cache
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from trainkit.kernels import _gluon
from trainkit.kernels._attention import _triton
from trainkit.kernels._attention._codegen import arguments
from trainkit.kernels._attention._launch import Box, Kept, counter
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._triton import Call, Tiling

HEADS = (64, 128, 256)
ROWS = 128
"""Queries (or keys) a program of a backward kernel, 64 a warpgroup."""
UNBOUNDED_CAP = 60.0
"""Soft caps up to this give exponentials between 2**-87 and 2**87: sums of them need no maximum."""


def why_not(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> str | None:
    """The reason the Hopper path cannot serve the call, or None."""
    lack = _triton.why_not(q, v, spec)
    if lack:
        return lack
    return _gluon.why_not(q) or unsupported(q, k, v, spec)


def unsupported(q: Tensor, k: Tensor, v: Tensor, spec: Spec) -> str | None:
    """What of the call, device aside, the Hopper kernels do not have."""
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"wgmma multiplies bf16 and fp16 here, got {q.dtype}"
    if q.shape[3] not in HEADS or v.shape[3] not in HEADS:
        return f"Hopper kernels have head_dim 64, 128 and 256, got {q.shape[3]} and {v.shape[3]}"
    if spec.sigmoid or spec.dropout_p > 0:
        return "sigmoid and dropout are in the Triton path"
    if spec.scale <= 0:
        return f"the folded softmax needs a positive scale, got {spec.scale}"
    return None


def _cap(spec: Spec) -> float | None:
    """The soft cap where it is all that is done to a score: the kernels then know it, and need no traced function."""
    return spec.softcap if spec.alibi_slopes is None and spec.score_mod is None else None


class Plane(NamedTuple):
    """A tensor `[B, S, H, D]` as a matrix of rows: token i of (b, h) is row `b * batch + h * head + i`, column `h * col`."""

    tensor: Tensor
    shape: tuple[int, int]
    stride: int
    batch: int
    head: int
    col: int


def plane(x: Tensor) -> Plane:
    """The tensor as TMA reads it: in place when its tokens or its heads lie evenly, else a copy."""
    B, S, H, D = x.shape
    sb, ss, sh, sd = x.stride()
    even = sd == 1 and x.data_ptr() % 16 == 0 and ss * x.element_size() % 16 == 0
    if even and sh == D and (B == 1 or sb == S * ss) and ss >= H * D:
        return Plane(x, (B * S, H * D), ss, S, 0, D)
    if even and sh == S * ss and (B == 1 or sb == H * sh) and ss >= D:
        return Plane(x, (B * H * S, D), ss, H * S, S, 0)
    return plane(x.clone(memory_format=torch.contiguous_format))  # `contiguous()` would keep one that starts unaligned


def descriptor(p: Plane, rows: int, width: int) -> Any:
    """A TMA descriptor of `[rows, width]` boxes of a plane."""
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    return TensorDescriptor(
        p.tensor, list(p.shape), [p.stride, 1], [rows, width], _swizzle(rows, width, p.tensor.dtype)
    )


@cache
def _swizzle(rows: int, width: int, dtype: torch.dtype) -> Any:
    import triton.experimental.gluon.language as gl

    element = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16, torch.float32: gl.float32}[dtype]
    return gl.NVMMASharedLayout.get_default_for([rows, width], element)


class Template:
    """What a kernel is compiled for: attributes that its code reads as constants. One object for equal constants."""

    _made: ClassVar[dict[Any, "Template"]] = {}
    _known: tuple[tuple[str, Any], ...]

    def __new__(cls, **constants: Any) -> "Template":
        known = tuple(constants.items())
        made = cls._made.get(known)
        if made is None:
            import triton.experimental.gluon.language as gl

            made = super().__new__(cls)
            made._known = known
            for name, value in known:
                setattr(made, name, gl.constexpr(value))
            if len(cls._made) >= 256:
                cls._made.pop(next(iter(cls._made)), None)
            cls._made[known] = made
        return made

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Template) and self._known == other._known

    def __hash__(self) -> int:
        return hash(self._known)

    def __repr__(self) -> str:
        # Part of the name under which Triton keeps the compiled kernel.
        return f"Template{self._known}"


def _forward_tile(d: int, dv: int, seen: float, causal: bool) -> dict[str, Any]:
    """Queries and keys a block, buffers in the ring and of queries: what 227 KB of shared memory and the registers hold.

    Args:
        seen: keys that a query sees on average.
        causal: whether blocks at an edge are seen in part.
    """
    wide = max(d, dv)
    if wide == 64:
        # A third warpgroup hides more of the exponentials, and wastes more at the edge of a mask.
        three = seen >= (2048 if causal else 1024)
        return {"BM": 192 if three else 128, "BN": 128, "ST": 3, "QS": 2, "TURNS": True, "LATE": three}
    return {
        "BM": 128, "BN": 128 if wide == 128 else 64, "ST": 2, "QS": 2 if wide == 128 else 1, "TURNS": False, "LATE": False,
    }  # fmt: skip


def _seen(k: Tensor, spec: Spec, listed: bool) -> float:
    """About how many keys a query sees; nothing is known where a mask_mod lists blocks or sequences are packed."""
    if listed:
        return 0.0
    whole = k.shape[1] / (2 if spec.causal else 1)
    return whole if spec.window is None else min(whole, spec.window)


@cache
def _processors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


# A kept launch, and shape and strides of the planes of q, k, v and out.
_KEPT: dict[Any, tuple[Kept, list[tuple[tuple[int, int], tuple[int, int]]]]] = {}


def _key(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call) -> Any:
    """What a plain call's launch depends on but the addresses; None where there is more to it."""
    spec, variant = call.spec, call.variant
    scored = variant.score is not None and _cap(spec) is None
    if scored or variant.mask is not None or call.packed is not None or not q.is_cuda:
        return None
    tensors = (q, k, v, *(() if sinks is None else (sinks,)), *(call.rope or ()))
    if any(x.data_ptr() % 16 for x in tensors):
        return None
    return (
        q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, q.device.index, spec.causal, spec.window,
        spec.softcap, spec.scale, None if sinks is None else sinks.dtype, call.rope is None,
    )  # fmt: skip


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call, launch: Any = None
) -> tuple[Tensor, Tensor]:
    """Compute out `[B, Sq, Hq, Dv]` and lse `[B, Hq, Sq]` fp32.

    Args:
        launch: called with the kernel and grid instead of `kernel[grid]` (the tests compile without a GPU).
    """
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    count = counter(q.device)
    spare = (count,) * 6
    tables = (lse if sinks is None else sinks, *(call.rope or (lse, lse)))
    key = _key(q, k, v, sinks, call)
    kept = None if key is None else _KEPT.get(key)
    if kept is not None:
        kernel, planes = kept
        boxes = (Box(x, *form) for x, form in zip((q, k, v, out), planes, strict=True))
        kernel(*boxes, out, lse, *tables, count, *spare)
        return out, lse
    from trainkit.kernels._attention import _hopper_forward

    spec, D, DV = call.spec, q.shape[3], v.shape[3]
    irregular = call.variant.mask is not None or call.packed is not None
    tile = _forward_tile(D, DV, _seen(k, spec, irregular), spec.causal)
    bm, bn = tile["BM"], tile["BN"]
    grid, pointers, strides, listed = _triton.layout(call, q, k, Tiling(bm, bn, 4, tile["ST"]), False)
    total = math.prod(grid)
    if total == 0:
        return out, lse
    cap = _cap(spec)
    functions = call.variant.functions("gluon")
    captured = tuple(() if x is None else arguments(x) for x in (call.variant.score, call.variant.mask))
    template = Template(
        GROUP=q.shape[2] // k.shape[2], D=D, DV=DV, CAUSAL=spec.causal, WINDOW=spec.window is not None,
        SINK=sinks is not None, PACKED=call.packed is not None, LISTED=listed, CAP=cap is not None,
        BOUNDED=cap is not None and cap <= UNBOUNDED_CAP and q.dtype == torch.bfloat16,
        SCORE=None if cap is not None else functions.score, MASK=functions.mask, BF16=q.dtype == torch.bfloat16,
        ROPE=call.rope is not None, **tile,
    )  # fmt: skip
    programs = min(total, _processors(q.device.index) if q.is_cuda else 132)
    qp, kp, vp, op = plane(q), plane(k), plane(v), plane(out)
    constants = (
        *strides, *qp[3:], *kp[3:], *vp[3:], q.shape[2] * DV, q.shape[2], q.shape[1], k.shape[1], spec.window or 0,
        spec.scale, cap or 1.0, *captured, grid[0], total, template,
    )  # fmt: skip
    run = (launch or operator.getitem)(_hopper_forward.forward, (programs,))
    compiled = run(
        descriptor(qp, 64, D), descriptor(kp, bn, D), descriptor(vp, bn, DV), descriptor(op, 64, min(DV, 128)), out, lse,
        *tables, count, *(x if p is None else p for x, p in zip(spare, pointers, strict=True)),
        *constants, num_warps=4,
    )  # fmt: skip
    if key is not None and all(p.tensor is x for p, x in zip((qp, kp, vp), (q, k, v), strict=True)):
        if len(_KEPT) >= 256:
            _KEPT.pop(next(iter(_KEPT)), None)
        _KEPT[key] = Kept(compiled, programs, constants), [(p.shape, (p.stride, 1)) for p in (qp, kp, vp, op)]
    return out, lse


class Pass(NamedTuple):
    """One launch of the key kernel: what it computes, queries a block, buffers of q and of the output's gradient."""

    dk: bool
    dv: bool
    queries: int
    q_ring: int
    grad_ring: int


def _passes(d: int, dv: int, functions: bool) -> tuple[Pass, ...]:
    """The launches whose accumulators fit in the registers: two of 256 columns do not, beside a tile of scores.

    Args:
        functions: whether a traced score or mask needs registers and shared memory of its own.
    """
    if max(d, dv) < 256:
        return (Pass(True, True, 128 if max(d, dv) == 64 else 64, 2, 2),)
    # dV alone needs no values: their room goes to a second buffer.
    return (
        Pass(True, False, 32, 2, 2) if functions else Pass(True, False, 64, 2, 1),
        Pass(False, True, 64, 2, 2) if d == dv else Pass(False, True, 32, 2, 2),
    )


def _key_tile(d: int, dv: int, functions: bool) -> tuple[int, int, int]:
    """Keys a block of the query kernel, buffers of k and of v; see `_passes`."""
    if max(d, dv) < 256:
        return 64, 4, 4
    return (32, 2, 2) if functions else (64, 2, 1)


class Sums(NamedTuple):
    """Room for dQ in fp32 while it is summed: see `_hopper_ring`."""

    tensor: Tensor
    marks: Tensor
    lag: int
    slots: int
    rows: int


def _sums(q: Tensor, k: Tensor, tiles: int, call: Call) -> Sums:
    units = k.shape[2] * q.shape[0]
    # A box may reach over the last token, in packed sequences from any row on.
    rows = (-(-q.shape[1] // ROWS) + (call.packed is not None)) * ROWS
    # Under a causal mask a head's longest program outlasts those on all processors twice.
    processors = _processors(q.device.index) if q.is_cuda else 132
    lag = min(units, max(2, math.ceil(2 * processors / tiles - 0.1)))
    # The last of a head's programs announce some microseconds after the first of the next head have started.
    slots = min(units, lag + 1 + min(lag, 400 // tiles**2))
    size = slots * q.shape[2] // k.shape[2] * rows * q.shape[3]
    room = torch.zeros(size + 2 * units, dtype=torch.float32, device=q.device)
    return Sums(room[:size].view(-1, q.shape[3]), room[size:].view(torch.int32), lag, slots, rows)


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    grad: Tensor,
    delta: Tensor,
    call: Call,
    launch: Any = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous; `delta` as `_triton.row_delta` gives it."""
    from trainkit.kernels._attention import _hopper_backward_keys, _hopper_backward_queries

    spec, D, DV = call.spec, q.shape[3], v.shape[3]
    # dQ in the same pass saves two of seven products, for a sum in fp32 whose adds come in any order.
    fused = D == DV and D < 256 and not spec.deterministic
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    planes = qp, kp, vp, gp = plane(q), plane(k), plane(v), plane(grad)
    dqp, dkp, dvp = plane(dq), plane(dk), plane(dv)
    steps = tuple(n for p in planes for n in p[3:])
    cap = _cap(spec)
    alibi = spec.alibi_slopes if spec.causal and spec.softcap is None and spec.score_mod is None else None
    functions = call.variant.functions("gluon")
    captured = tuple(() if x is None else arguments(x) for x in (call.variant.score, call.variant.mask))
    constants = {
        "GROUP": q.shape[2] // k.shape[2], "D": D, "DV": DV, "CAUSAL": spec.causal, "WINDOW": spec.window is not None,
        "PACKED": call.packed is not None, "CAP": cap is not None, "ALIBI": 0 if alibi is None else alibi.dim(),
    }  # fmt: skip
    scored = call.variant.score is not None and cap is None and alibi is None
    derived = scored and not call.variant.adds
    traced = scored or functions.mask is not None

    kernel: Any = _hopper_backward_keys.backward_keys
    for want_dk, want_dv, bm, q_ring, grad_ring in _passes(D, DV, traced):
        grid, pointers, strides, listed = _triton.layout(call, q, k, Tiling(bm, ROWS, 4, q_ring), True)
        programs = (math.prod(grid),)
        if programs[0] == 0:
            continue
        room: tuple[Any, ...] = (dq, delta, delta, 0, 0, 0)
        sums = dqp
        if fused:
            ring = _sums(q, k, grid[0], call)
            room = (dq, *ring)
            sums = Plane(ring.tensor, (ring.tensor.shape[0], D), D, 0, 0, 0)
            programs = (programs[0] + ring.lag * grid[0],)
        template = Template(
            **constants, BM=bm, ST=q_ring, SO=grad_ring, WANT_DK=want_dk, WANT_DV=want_dv, VALUES=want_dk or D != DV,
            FUSED=fused, LATE=fused and D == 128, LISTED=listed, SCORE=functions.score_t if scored else None,
            GRAD=functions.score_grad_t if derived else None, MASK=functions.mask_t,
        )  # fmt: skip
        (launch(kernel, programs) if launch else kernel[programs])(
            descriptor(qp, bm, D), descriptor(kp, 64, D), descriptor(vp, 64, DV), descriptor(gp, bm, DV),
            descriptor(dkp, 64, D), descriptor(dvp, 64, DV), descriptor(sums, 64, D * bm // 128), *room, dk, dv, lse, delta,
            *(delta if p is None else p for p in pointers), *strides, *steps, k.shape[2] * D, k.shape[2] * DV, q.shape[2],
            *k.shape[2:3], q.shape[1], k.shape[1], spec.window or 0, spec.scale, cap or 1.0, *captured, grid[0], template,
            num_warps=4,
        )  # fmt: skip
    if fused:
        return dq, dk, dv

    bn, key_ring, value_ring = _key_tile(D, DV, traced)
    grid, pointers, strides, listed = _triton.layout(call, q, k, Tiling(ROWS, bn, 4, key_ring), False)
    kernel = _hopper_backward_queries.backward_queries
    programs = (math.prod(grid),)
    if programs[0]:
        template = Template(
            **constants, BM=ROWS, BN=bn, ST=key_ring, SV=value_ring, LISTED=listed, SCORE=functions.score if scored else None,
            GRAD=functions.score_grad if derived else None, MASK=functions.mask,
        )  # fmt: skip
        (launch(kernel, programs) if launch else kernel[programs])(
            descriptor(qp, 64, D), descriptor(kp, bn, D), descriptor(vp, bn, DV), descriptor(gp, 64, DV),
            descriptor(dqp, 64, D), dq, lse, delta, *(delta if p is None else p for p in pointers), *strides, *steps,
            q.shape[2] * D, q.shape[2], q.shape[1], k.shape[1], spec.window or 0, spec.scale, cap or 1.0, *captured,
            grid[0], template, num_warps=4,
        )  # fmt: skip
    return dq, dk, dv
