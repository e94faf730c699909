"""The Triton path: every variant, forward and backward, on any GPU that Triton serves (and on its interpreter)."""

from typing import Any

import torch
from torch import Tensor

from trainkit.kernels._attention._call import Call, Tiling, layout
from trainkit.kernels._attention._codegen import arguments
from trainkit.kernels._attention._delta import padded, strides_of
from trainkit.kernels._attention._dropout import threshold
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._grid import flat
from trainkit.kernels._installed import lacking
from trainkit.kernels._launch import Template
from trainkit.kernels.fused._launch import transformed

LARGEST_HEAD = 256


def interpreted() -> bool:
    """Whether Triton runs its kernels on the CPU, in Python."""
    if lacking():
        return False
    import triton

    return bool(triton.knobs.runtime.interpret)


def why_not(q: Tensor, v: Tensor, spec: Spec) -> str | None:
    """The reason the Triton path cannot serve the call, or None."""
    if lack := lacking():
        return lack
    if transformed(q):
        return "torch.func's transforms go through plain PyTorch"
    if not q.is_cuda and not interpreted():
        return f"Triton has no kernels on {q.device.type}"
    if q.dtype == torch.float64:
        return "fp64 is served by the reference"
    if max(q.shape[3], v.shape[3]) > LARGEST_HEAD:
        return f"kernels end at head_dim {LARGEST_HEAD}, got {max(q.shape[3], v.shape[3])}"
    return None


def _tiling(kind: str, d: int, dv: int, q: Tensor) -> Tiling:
    """Tile sizes by head dimension; `kind` is forward, keys or queries."""
    if not q.is_cuda:
        return Tiling(32, 32, 4, 1)
    wide = max(padded(d), padded(dv))
    if q.dtype == torch.float32:
        return Tiling(64, 32, 4, 2) if wide <= 64 else Tiling(32, 32, 4, 2) if wide <= 128 else Tiling(16, 16, 4, 1)
    if getattr(torch.cuda.get_device_properties(q.device), "shared_memory_per_block_optin", 0) < 160 << 10:
        side = 64 if wide <= 128 else 32
        return Tiling(side, side, 4, 2 if wide <= 128 else 1)
    table = {
        "forward": (Tiling(128, 128, 8, 3), Tiling(128, 128, 8, 2), Tiling(128, 64, 8, 2)),
        "keys": (Tiling(64, 128, 8, 3), Tiling(64, 128, 8, 2), Tiling(32, 64, 8, 2)),
        "queries": (Tiling(128, 64, 8, 3), Tiling(128, 64, 8, 2), Tiling(64, 32, 4, 2)),
    }
    return table[kind][0 if wide <= 64 else 1 if wide <= 128 else 2]


def _rows(x: Tensor) -> Tensor:
    """A tensor whose last dimension is laid out densely."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _scalars(call: Call, q: Tensor, k: Tensor) -> tuple[Any, ...]:
    """Numbers and captured tensors in the order of every kernel's signature."""
    spec = call.spec
    keep_scale = 1.0 / (1.0 - spec.dropout_p)
    return (
        q.shape[2], q.shape[1], k.shape[1], spec.window or 0, spec.scale, spec.seed, threshold(spec.dropout_p), keep_scale,
        arguments(call.variant.score_tables), arguments(call.variant.mask_tables),
    )  # fmt: skip


def _constants(
    call: Call, q: Tensor, k: Tensor, v: Tensor, tiling: Tiling, block_sparse: bool, page: int = 0, **more: Any
) -> Template:
    """What a kernel is compiled for.

    LISTED_WORK: programs take their work from a list, otherwise from a grid. PAGE: keys a page, 0 where keys lie densely.
    """
    spec, functions = call.spec, call.variant.functions("triton")
    return Template(
        GROUP=q.shape[2] // k.shape[2], D=q.shape[3], DV=v.shape[3], BD=padded(q.shape[3]), BDV=padded(v.shape[3]),
        BM=tiling.bm, BN=tiling.bn, CAUSAL=spec.causal, WINDOW=spec.window is not None, SIGMOID=spec.sigmoid,
        DROPOUT=spec.dropout_p > 0, LISTED_WORK=call.packed is not None, BLOCK_SPARSE=block_sparse, PAGE=page,
        PRECISION="tf32x3" if q.dtype == torch.float32 and q.is_cuda else "ieee", SCORE=functions.score,
        MASK=functions.mask, GRAD=functions.score_grad, **more,
    )  # fmt: skip


def view(x: Tensor) -> tuple[Any, ...]:
    """A tensor as the kernels take it: pointer, strides of batch, tokens and heads."""
    return x, *strides_of(x)


def launch(kernel: Any, grid: tuple[int, ...], tiling: Tiling, *args: Any) -> None:
    """Run a kernel of the template, which wants the grid's first dimension before its constants."""
    run(kernel, flat(grid), tiling, *args[:-1], grid[0], args[-1])


def run(kernel: Any, grid: tuple[int, ...], tiling: Tiling, *args: Any) -> None:
    """Run a kernel with fewer pipeline stages if its shared memory does not fit: a variant's own loads take some."""
    from triton.runtime.errors import OutOfResources

    for stages in range(tiling.stages, 0, -1):
        try:
            kernel[grid](*args, num_warps=tiling.warps, num_stages=stages)
            return
        except OutOfResources:
            if stages == 1:
                raise


def forward(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, call: Call) -> tuple[Tensor, Tensor]:
    """Return out `[B, Sq, Hq, Dv]` and lse `[B, Hq, Sq]` fp32."""
    from trainkit.kernels._attention import _triton_forward

    q, k, v = _rows(q), _rows(k), _rows(v)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = torch.zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    tiling = _tiling("forward", q.shape[3], v.shape[3], q)
    grid, (*work, blocks, counts, full), strides, sparse = layout(call, q, k, tiling, False)
    if 0 not in grid:
        launch(
            _triton_forward.forward, grid, tiling, view(q), view(k), view(v), view(out), lse, sinks, *work,
            (blocks, counts, full, *strides), (), 0, 0, *_scalars(call, q, k),
            _constants(call, q, k, v, tiling, sparse, SINK=sinks is not None),
        )  # fmt: skip
    return out, lse


def backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, grad: Tensor, delta: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of q, k, v, and of the captured tensors that learn (`call.variant.learned`); `delta` is `row_delta`."""
    from trainkit.kernels._attention import _triton_backward

    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad)
    dq, dk, dv = (_rows(torch.empty_like(x)) for x in (q, k, v))
    scalars = _scalars(call, q, k)
    inputs = (view(q), view(k), view(v), view(grad), lse, delta)

    tiling = _tiling("keys", q.shape[3], v.shape[3], q)
    grid, (*work, blocks, counts, full), strides, sparse = layout(call, q, k, tiling, True)
    if 0 not in grid:
        launch(
            _triton_backward.backward_keys, grid, tiling, *inputs, view(dk), view(dv), *work,
            (blocks, counts, full, *strides), (), (), *scalars, _constants(call, q, k, v, tiling, sparse),
        )  # fmt: skip

    learned, captured = call.variant.learned, call.variant.score_tables
    tables = [torch.zeros_like(t, dtype=torch.float32) for t in captured] if learned else []
    tiling = _tiling("queries", q.shape[3], v.shape[3], q)
    grid, (*work, blocks, counts, full), strides, sparse = layout(call, q, k, tiling, False)
    if 0 not in grid:
        launch(
            _triton_backward.backward_queries, grid, tiling, *inputs, view(dq), *work, (blocks, counts, full, *strides), (), 0,
            *scalars, arguments(tables), _constants(call, q, k, v, tiling, sparse, TABLES=bool(learned)),
        )  # fmt: skip
    return dq, dk, dv, [tables[i].to(captured[i].dtype) for i in learned]
