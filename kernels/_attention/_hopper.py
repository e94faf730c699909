"""The Hopper path: Gluon kernels for bf16 and fp16 on compute capability 9, head_dim 64, 128 and 256."""

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainkit.kernels import _gluon
from trainkit.kernels._attention import _block_lists, _triton
from trainkit.kernels._attention._call import Call, Tiling, layout
from trainkit.kernels._attention._codegen import arguments
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._views import aligned, dense_view, matrix_view
from trainkit.kernels._cache import capturing, stream
from trainkit.kernels._launch import PLANS, Descriptor, Launch, Slot, Template, counter, signature

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


def _forward_tile(d: int, dv: int, seen: float, causal: bool) -> dict[str, Any]:
    """Queries and keys a block, stages of them and of queries: what 227 KB of shared memory and the registers hold.

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


def _seen(k: Tensor, spec: Spec, irregular: bool) -> float:
    """About how many keys a query sees; nothing is known where a mask_mod lists blocks or sequences are packed."""
    if irregular:
        return 0.0
    whole = k.shape[1] / (2 if spec.causal else 1)
    return whole if spec.window is None else min(whole, spec.window)


@cache
def _of_device(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _processors(x: Tensor) -> int:
    """Multiprocessors, each of which holds one program; an H100's where there is no GPU."""
    return _of_device(x.device.index) if x.is_cuda else 132


def _programs(x: Tensor, tiles: int) -> int:
    return min(tiles, _processors(x))


class Plan(NamedTuple):
    """What calls of one signature share: which of q, k, v (and the output's gradient) are copied, launches, room for dQ."""

    copied: tuple[bool, ...]
    launches: tuple[Launch, ...]
    pool: "Pool | None" = None

    def inputs(self, *tensors: Tensor) -> list[Tensor]:
        return [x.contiguous() if copy else x for x, copy in zip(tensors, self.copied, strict=True)]


def _planned(what: str, call: Call, make: Callable[[], Plan], *tensors: Tensor) -> Plan:
    """The plan of a call of this signature, made once: for its mask and traced functions, if it has any, and for its packed
    sequences.
    """
    spec, variant, packed = call.spec, call.variant, call.packed
    known = signature(*tensors)
    if known is None or (packed is not None and capturing(tensors[0].device)):
        return make()
    # Packed sequences' list of tiles is for one stream: see `packed_tiles`.
    own = () if packed is None else (id(packed), stream(tensors[0].device))
    key = (what, known, spec.causal, spec.window, spec.softcap, spec.scale, spec.deterministic, *own)
    if variant.mask is None and (variant.score is None or _cap(spec) is not None):
        return PLANS.get(key, make, () if packed is None else (packed,))  # type: ignore[no-any-return]
    if packed is not None:
        return make()
    return _block_lists.kept(variant, tensors[0].device, key, make)


def _captured(call: Call, first: int, masked: bool = True) -> tuple[Any, ...]:
    """Score's and mask's tensors as their functions read them, each a slot: from number `first` on the call brings them."""
    slots: list[tuple[Any, ...]] = []
    for tables, wanted in ((call.variant.score_tables, True), (call.variant.mask_tables, masked)):
        numbers = iter(range(first, first + len(tables)))
        flat = arguments(tables) if wanted else ()
        slots.append(tuple(Slot(next(numbers)) if isinstance(x, Tensor) else x for x in flat))
        first += len(tables)
    return tuple(slots)


def _bits(call: Call, q: Tensor, k: Tensor, bm: int, bn: int, by_keys: bool) -> _block_lists.Bits | None:
    """The mask's bits in blocks of bm queries and bn keys, where it need not be evaluated: `_block_lists.bits`."""
    if call.variant.mask is None or call.packed is not None:
        return None
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    return _block_lists.bits(_block_lists.Blocks(call.variant, call.spec, *shape, bm, bn, q.device, by_keys))


def forward(
    q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call, launch: Any = None
) -> tuple[Tensor, Tensor]:
    """Compute out `[B, Sq, Hq, Dv]` and lse `[B, Hq, Sq]` fp32.

    Args:
        launch: as `Launch` takes it.
    """
    q, k, v = aligned(q), aligned(k), aligned(v)
    out = torch.empty(*q.shape[:3], v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    # None, one, two or three: how many tells which.
    tables = (*(() if sinks is None else (sinks,)), *(call.rope or ()))
    plan = _planned("forward", call, lambda: _forward_plan(q, k, v, sinks, call), q, k, v, *tables)
    captured = (*call.variant.score_tables, *call.variant.mask_tables)
    tensors = (*plan.inputs(q, k, v), out, lse, counter(q.device), *tables, *captured)
    for run in plan.launches:
        run(tensors, launch)
    return out, lse


def _forward_plan(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call) -> Plan:
    """Tensors of the launch: q, k, v, out, lse, the counter, then sinks, and cos and sin, as far as there are any."""
    from trainkit.kernels._attention import _hopper_forward

    spec, D, DV = call.spec, q.shape[3], v.shape[3]
    irregular = call.variant.mask is not None or call.packed is not None
    tile = _forward_tile(D, DV, _seen(k, spec, irregular), spec.causal)
    bm, bn = tile["BM"], tile["BN"]
    grid, lists, strides, sparse = layout(call, q, k, Tiling(bm, bn, 4, tile["ST"]), False)
    qv, kv, vv, ov = matrix_view(q), matrix_view(k), matrix_view(v), dense_view(q.shape[0], q.shape[1], q.shape[2], DV)
    copied = (qv.copied, kv.copied, vv.copied)
    total = math.prod(grid)
    if total == 0:
        return Plan(copied, ())
    cap = _cap(spec)
    functions = call.variant.functions("gluon")
    bits = _bits(call, q, k, bm, bn, False)
    template = Template(
        GROUP=q.shape[2] // k.shape[2], D=D, DV=DV, CAUSAL=spec.causal, WINDOW=spec.window is not None,
        SINK=sinks is not None, LISTED_WORK=call.packed is not None, BLOCK_SPARSE=sparse, PAGE=0, CAP=cap is not None,
        BOUNDED=cap is not None and cap <= UNBOUNDED_CAP and q.dtype == torch.bfloat16,
        SCORE=None if cap is not None else functions.score, MASK=functions.mask if bits is None else None,
        BITS=bits is not None, BF16=q.dtype == torch.bfloat16, ROPE=call.rope is not None, **tile,
    )  # fmt: skip
    constants = (
        strides, (qv.steps, kv.steps, vv.steps), q.shape[2] * DV, 0, 0, q.shape[2], q.shape[1], k.shape[1], spec.window or 0,
        spec.scale, cap or 1.0, *_captured(call, 6 + (sinks is not None) + len(call.rope or ()), bits is None), grid[0], total,
        template,
    )  # fmt: skip
    descriptors = (
        qv.descriptor(0, 64, D), kv.descriptor(1, bn, D), vv.descriptor(2, bn, DV), ov.descriptor(3, 64, min(DV, 128)),
    )  # fmt: skip
    first = 6 if sinks is None else 7
    tables = (4 if sinks is None else 6, *((4, 4) if call.rope is None else (first, first + 1)))
    pointers = (3, 4, *tables, 5, *(5 if p is None else p for p in (*lists, *(bits or (None, None)), None, None)))
    return Plan(
        copied, (Launch(_hopper_forward.forward, (_programs(q, total), 1, 1), descriptors, pointers, constants),)
    )


class Pass(NamedTuple):
    """One launch of the key kernel: what it computes, queries a block, buffers of q and of the output's gradient."""

    dk: bool
    dv: bool
    queries: int
    q_stages: int
    grad_stages: int


def _passes(d: int, dv: int, functions: bool) -> tuple[Pass, ...]:
    """The launches whose accumulators fit in the registers: two of 256 columns do not, beside a tile of scores.

    Args:
        functions: whether a traced score or mask needs registers and shared memory of its own.
    """
    if max(d, dv) < 256:
        return (Pass(True, True, 128 if max(d, dv) == 64 else 64, 2, 2),)
    # dV alone needs no values: their memory goes to a second stage.
    return (
        Pass(True, False, 32, 2, 2) if functions else Pass(True, False, 64, 2, 1),
        Pass(False, True, 64, 2, 2) if d == dv else Pass(False, True, 32, 2, 2),
    )


def _key_tile(d: int, dv: int, functions: bool) -> tuple[int, int, int]:
    """Keys a block of the query kernel, buffers of k and of v; see `_passes`."""
    if max(d, dv) < 256:
        return 64, 4, 4
    return (32, 2, 2) if functions else (64, 2, 1)


class Pool(NamedTuple):
    """Accumulators in fp32 for dQ while it is summed: see `_hopper_dq_pool`."""

    size: int
    marks: int
    delay: int
    slots: int
    rows: int

    def workspace(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Zeros to sum in, and to mark what is done in."""
        zeros = torch.zeros(self.size + self.marks, dtype=torch.float32, device=device)
        return zeros, zeros.narrow(0, self.size, self.marks).view(torch.int32)


def _under_way(q: Tensor, tiles: int, groups: int) -> int:
    """Groups, key heads of a batch entry, whose tiles fill the processors about once."""
    return min(groups, max(1, _processors(q) // tiles))


def _pool(q: Tensor, k: Tensor, tiles: int, call: Call) -> Pool:
    groups = k.shape[2] * q.shape[0]
    # A block may reach over the last token, in packed sequences from any row on.
    rows = (-(-q.shape[1] // ROWS) + (call.packed is not None)) * ROWS
    delay = _under_way(q, tiles, groups)
    # Under a causal mask a head's longest tile outlasts two rounds of all processors, and its conversion follows: with less
    # memory tiles wait. Never less than 2 * delay: the last groups' tiles, not taken group by group, would wait for each
    # other.
    rounds = _processors(q) / tiles
    slots = min(groups, max(2, math.ceil(2 * rounds - 0.1)) + 1 + max(0, int(1.5 * rounds - 1)))
    return Pool(slots * q.shape[2] // k.shape[2] * rows * q.shape[3], 2 * groups, delay, slots, rows)


POOL_FROM = {64: (0, 12), 128: (4, 8)}
"""By head_dim, how many tiles of keys a query must meet for its sums' conversion to hide behind products: where a mask is
causal or none, and where most of a long head's tiles are not seen (a window, a mask_mod); measured beside each other in
`benchmarks/kernels/2026-12-01.md`.
"""
UNEVEN_FROM = 2.5
"""How much longer than the average a mask's longest tile may be: heads wait for it in the pool. Causal: 2."""


def _pooled(q: Tensor, k: Tensor, call: Call, bm: int) -> bool:
    """Whether to sum dQ in a pool, in the pass of dK and dV; otherwise a pass of its own is faster, and as exact every time.

    One pass saves two products of seven, and costs the sums' way through memory in fp32: nearly empty tiles do not pay it.
    A captured graph cannot ask how many blocks a mask has: two passes are never slow.
    """
    spec, (Sq, Sk), (plain, sparse) = call.spec, (q.shape[1], k.shape[1]), POOL_FROM[q.shape[3]]
    if call.packed is not None:
        # Planned by every call: fewer launches count.
        return True
    if call.variant.mask is not None:
        if capturing(q.device):
            return False
        blocks = _block_lists.Blocks(call.variant, spec, q.shape[0], q.shape[2], Sq, Sk, bm, ROWS, q.device, True)
        counts = _block_lists.lists(blocks).counts.float()
        mean, longest = (bm * n for n in torch.stack([counts.mean(), counts.max()]).tolist())
        return bool(mean * Sk >= sparse * ROWS * Sq and longest <= UNEVEN_FROM * mean)
    met = Sk / ROWS / (2 if spec.causal else 1)
    if spec.window is not None and spec.window < Sk:
        return min(met, (spec.window if spec.causal else 2 * spec.window) / ROWS + 1) >= sparse
    return met >= plain


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
    """Gradients of q, k and v, contiguous; `delta` as `row_delta` gives it, `launch` as `Launch` takes it."""
    q, k, v, grad = aligned(q), aligned(k), aligned(v), aligned(grad)
    dq, dk, dv = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    plan = _planned("backward", call, lambda: _backward_plan(q, k, v, grad, call), q, k, v, grad, lse, delta)
    workspace = () if plan.pool is None else plan.pool.workspace(q.device)
    captured = (*call.variant.score_tables, *call.variant.mask_tables)
    tensors = (*plan.inputs(q, k, v, grad), dq, dk, dv, lse, delta, counter(q.device), *workspace, *captured)
    for run in plan.launches:
        run(tensors, launch)
    return dq, dk, dv


def _backward_plan(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, call: Call) -> Plan:
    """Tensors of each launch: q, k, v, grad, dq, dk, dv, lse, delta, the counter; where dQ is summed, also the pool's sums
    and marks.
    """
    from trainkit.kernels._attention import _hopper_backward_keys, _hopper_backward_queries

    spec, D, DV = call.spec, q.shape[3], v.shape[3]
    # dQ in the same pass saves two of seven products, for a sum in fp32 whose adds come in any order.
    bm = _passes(D, DV, False)[0].queries
    fused = D == DV and D < 256 and not spec.deterministic and _pooled(q, k, call, bm)
    views = qv, kv, vv, gv = matrix_view(q), matrix_view(k), matrix_view(v), matrix_view(grad)
    copied = tuple(x.copied for x in views)
    steps = tuple(x.steps for x in views)
    dqv, dkv, dvv = (dense_view(*x.shape) for x in (q, k, v))
    cap = _cap(spec)
    alibi = spec.alibi_slopes if spec.causal and spec.softcap is None and spec.score_mod is None else None
    functions = call.variant.functions("gluon")
    constants = {
        "GROUP": q.shape[2] // k.shape[2], "D": D, "DV": DV, "CAUSAL": spec.causal, "WINDOW": spec.window is not None,
        "LISTED_WORK": call.packed is not None, "PAGE": 0, "CAP": cap is not None, "ALIBI": 0 if alibi is None else alibi.dim(),
    }  # fmt: skip
    scored = call.variant.score is not None and cap is None and alibi is None
    derived = scored and not call.variant.adds
    traced = scored or functions.mask is not None
    scalars = (q.shape[1], k.shape[1], spec.window or 0, spec.scale, cap or 1.0)

    launches = []
    pool = None
    for want_dk, want_dv, bm, q_stages, grad_stages in _passes(D, DV, traced):
        grid, lists, strides, sparse = layout(call, q, k, Tiling(bm, ROWS, 4, q_stages), True)
        total = math.prod(grid)
        if total == 0:
            continue
        if not fused:
            # No pool, and no more of its numbers than the order of tiles needs.
            delay = _under_way(q, grid[0], total // grid[0])
            sums, numbers, workspace = dqv.descriptor(4, 64, D * bm // 128), (delay, 1, 0), (8, 8)
        else:
            pool = _pool(q, k, grid[0], call)
            sums = Descriptor(10, (pool.size // D, D), D, (64, D * bm // 128))
            numbers, workspace = pool[2:], (10, 11)
            total += pool.delay * grid[0]
        bits = _bits(call, q, k, bm, ROWS, True)
        template = Template(
            **constants, BM=bm, ST=q_stages, SO=grad_stages, WANT_DK=want_dk, WANT_DV=want_dv, VALUES=want_dk or D != DV,
            FUSED=fused, LATE=fused and D == 128, STAGED=D == DV and D < 256, BLOCK_SPARSE=sparse,
            SCORE=functions.score_t if scored else None,
            GRAD=functions.score_grad_t if derived else None, MASK=functions.mask_t if bits is None else None,
            BITS=bits is not None,
        )  # fmt: skip
        descriptors = (
            qv.descriptor(0, bm, D), kv.descriptor(1, 64, D), vv.descriptor(2, 64, DV), gv.descriptor(3, bm, DV),
            dkv.descriptor(5, 64, D), dvv.descriptor(6, 64, DV), sums,
        )  # fmt: skip
        launches.append(
            Launch(
                _hopper_backward_keys.backward_keys, (_programs(q, total), 1, 1), descriptors,
                (4, *workspace, 5, 6, 7, 8, 9, *(8 if p is None else p for p in (*lists, *(bits or (None, None)), None, None))),
                (
                    *numbers, strides, steps, k.shape[2] * D, k.shape[2] * DV, q.shape[2], k.shape[2], *scalars,
                    *_captured(call, 12 if fused else 10, bits is None), grid[0], total, template,
                ),
            )
        )  # fmt: skip
    if fused:
        return Plan(copied, tuple(launches), pool)

    bn, key_stages, value_stages = _key_tile(D, DV, traced)
    grid, lists, strides, sparse = layout(call, q, k, Tiling(ROWS, bn, 4, key_stages), False)
    if math.prod(grid):
        bits = _bits(call, q, k, ROWS, bn, False)
        template = Template(
            **constants, BM=ROWS, BN=bn, ST=key_stages, SV=value_stages, BLOCK_SPARSE=sparse,
            SCORE=functions.score if scored else None, GRAD=functions.score_grad if derived else None,
            MASK=functions.mask if bits is None else None, BITS=bits is not None,
        )  # fmt: skip
        sides = (
            qv.descriptor(0, 64, D), kv.descriptor(1, bn, D), vv.descriptor(2, bn, DV), gv.descriptor(3, 64, DV),
            dqv.descriptor(4, 64, D),
        )  # fmt: skip
        launches.append(
            Launch(
                _hopper_backward_queries.backward_queries, (math.prod(grid), 1, 1), sides,
                (4, 7, 8, *(8 if p is None else p for p in (*lists, *(bits or (None, None)), None, None))),
                (
                    strides, steps, q.shape[2] * D, 0, q.shape[2], *scalars, *_captured(call, 10, bits is None),
                    grid[0], template,
                ),
            )
        )  # fmt: skip
    return Plan(copied, tuple(launches))
