"""Paged attention as a differentiable function: gradients through the pages, without a copy of the keys."""

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trainkit.kernels._attention import _triton
from trainkit.kernels._attention._call import Call, from_host, packed_tiles
from trainkit.kernels._attention._codegen import arguments
from trainkit.kernels._attention._delta import row_delta, sink_gradient
from trainkit.kernels._attention._spec import Packed, Spec
from trainkit.kernels._attention._variant import Variant
from trainkit.kernels._once import only_once
from trainkit.kernels.paged import _launch
from trainkit.kernels.paged._launch import Arrays
from trainkit.kernels.paged._tables import Pages, Tables

if TYPE_CHECKING:
    from trainkit.kernels.paged._attention import Planned

NO_BLOCKS = (None, None, None, 0, 0, 0)


class _Paged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, keys: Tensor, values: Tensor, sinks: Tensor | None, spec: Spec, variant: Variant,
        planned: "Planned", arrays: Arrays, *captured: Tensor,
    ) -> Any:  # fmt: skip
        out, lse = _launch.forward(q, Pages(keys, values), spec, variant, planned.tiles, arrays, (None, None))
        ctx.save_for_backward(q, keys, values, sinks, out, lse)
        ctx.call, ctx.planned = (spec, variant), planned
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @only_once("paged attention")
    def backward(ctx: Any, *grads: Any) -> Any:
        q, keys, values, sinks, out, lse = ctx.saved_tensors
        spec, variant = ctx.call
        grad = torch.zeros_like(out) if grads[0] is None else grads[0].contiguous()
        lse = lse.T.contiguous()[None]
        grad_lse = None if grads[1] is None else grads[1].T.contiguous()[None]
        delta = row_delta(out[None], grad[None], grad_lse)
        dq, dk, dv, tables = backward(q, Pages(keys, values), lse, grad, delta, spec, variant, ctx.planned.tables)
        dsinks = None if sinks is None else sink_gradient(sinks, lse, delta)
        return dq, dk, dv, dsinks, None, None, None, None, *tables


def backward(
    q: Tensor, pages: Pages, lse: Tensor, grad: Tensor, delta: Tensor, spec: Spec, variant: Variant, tables: Tables
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of q, the two halves of the cache, and captured tensors that learn.

    Args:
        lse: `[1, Hq, tokens]`, like `delta`, `row_delta`'s.
    """
    from trainkit.kernels._attention import _triton_backward

    device, page = q.device, pages.page_size
    lengths = tables.lengths(page)
    bounds_q, bounds_k = tuple(map(int, tables.qo_indptr)), (0, *map(int, np.cumsum(lengths)))
    cu_q, cu_k = from_host(bounds_q, device), from_host(bounds_k, device)
    call = Call(spec, Packed(cu_q, cu_k, bounds_q, bounds_k), variant)
    indptr = torch.from_numpy(tables.kv_indptr).to(device)
    paging = indptr, torch.from_numpy(tables.kv_indices).to(device)
    like_k, like_v = pages.keys.flatten(0, 1)[None], pages.values.flatten(0, 1)[None]
    q4, grad4 = q[None], grad[None]
    scalars = _triton._scalars(call, q4, like_k)
    inputs = (_triton.view(q4), _launch.view(pages.keys), _launch.view(pages.values), _triton.view(grad4), lse, delta)

    # Pages of one request alone get their gradients where they lie; others once for each request, added in order.
    uses = np.bincount(tables.kv_indices, minlength=pages.keys.shape[0])
    shared = bool(uses.max(initial=0) > 1)
    if shared:
        room = (len(tables.kv_indices), *pages.keys.shape[1:3])
        dk, dv = (torch.zeros(*room, x.shape[3], dtype=torch.float32, device=device) for x in pages)
        to = indptr, torch.arange(len(tables.kv_indices), dtype=torch.int32, device=device)
    else:
        dk, dv = (torch.zeros(x.shape, dtype=x.dtype, device=device) for x in pages)
        to = paging
    tiling = _triton._tiling("keys", q.shape[2], pages.values.shape[3], q4)
    tiles = packed_tiles(bounds_k, tiling.bn, device)
    if tiles.shape[0]:
        _triton.launch(
            _triton_backward.backward_keys, (tiles.shape[0], pages.keys.shape[2], 1), tiling, *inputs, _launch.view(dk),
            _launch.view(dv), tiles, cu_q, cu_k, NO_BLOCKS, paging, to, *scalars,
            _triton._constants(call, q4, like_k, like_v, tiling, False, page),
        )  # fmt: skip
    if shared:
        dk, dv = (_added(x, tables.kv_indices, like) for x, like in zip((dk, dv), pages, strict=True))

    learned, captured = variant.learned, variant.score_tables
    sums = [torch.zeros_like(t, dtype=torch.float32) for t in captured] if learned else []
    dq = torch.zeros(q.shape, dtype=q.dtype, device=device)
    tiling = _triton._tiling("queries", q.shape[2], pages.values.shape[3], q4)
    tiles = packed_tiles(bounds_q, tiling.bm, device)
    if tiles.shape[0]:
        _triton.launch(
            _triton_backward.backward_queries, (tiles.shape[0], q.shape[1], 1), tiling, *inputs, _triton.view(dq[None]),
            tiles, cu_q, cu_k, NO_BLOCKS, paging, 0, *scalars, arguments(sums),
            _triton._constants(call, q4, like_k, like_v, tiling, False, page, TABLES=bool(learned)),
        )  # fmt: skip
    return dq, dk, dv, [sums[i].to(captured[i].dtype) for i in learned]


def _added(parts: Tensor, indices: Any, like: Tensor) -> Tensor:
    """Parts `[uses, page, Hkv, D]` summed into the pages that they are of, in the order of their requests: the same bits."""
    total = torch.zeros(like.shape, dtype=torch.float32, device=parts.device)
    order = np.argsort(indices, kind="stable")
    first = np.concatenate([[True], np.diff(indices[order]) != 0]) if len(order) else np.zeros(0, bool)
    turn = np.arange(len(order)) - np.maximum.accumulate(np.where(first, np.arange(len(order)), 0))
    for t in range(int(turn.max(initial=-1)) + 1):
        which = torch.from_numpy(order[turn == t]).to(parts.device)
        where = torch.from_numpy(indices[order[turn == t]].astype(np.int64)).to(parts.device)
        total[where] += parts[which]
    return total.to(like.dtype)


def attend(
    q: Tensor, pages: Pages, spec: Spec, variant: Variant, planned: "Planned", arrays: Arrays,
    scales: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Paged attention by the kernels, differentiable where gradients are asked for.

    Raises:
        ValueError: gradients through a cache in another dtype than the queries', or with scales.
    """
    learned = [variant.score_tables[i] for i in variant.learned]
    asked = any(x is not None and x.requires_grad for x in (q, *pages, spec.sinks, *learned))
    if not torch.is_grad_enabled() or not asked:
        return _launch.forward(q, pages, spec, variant, planned.tiles, arrays, scales)
    if pages.keys.dtype != q.dtype or scales[0] is not None:
        raise ValueError(
            f"gradients need a cache in the queries' dtype and without scales, got {pages.keys.dtype} and {q.dtype}"
            f"{' with scales' * (scales[0] is not None)}: detach q, or keep the cache in {q.dtype}"
        )
    if q.shape[0] != int(planned.tables.qo_indptr[-1]):
        raise ValueError("gradients need a plan without cuda_graph_max, whose rows are exactly q's")
    return _Paged.apply(q, *pages, spec.sinks, spec, variant, planned, arrays, *learned)  # type: ignore[no-untyped-call, no-any-return]
