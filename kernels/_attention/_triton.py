"""The Triton path: every variant, forward and backward, on any GPU that Triton serves (and on its interpreter)."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainkit.kernels._attention import _block_lists
from trainkit.kernels._attention._codegen import arguments
from trainkit.kernels._attention._dropout import threshold
from trainkit.kernels._attention._launch import PLANS, Launch, form
from trainkit.kernels._attention._spec import Packed, Spec
from trainkit.kernels._attention._variant import Variant
from trainkit.kernels._cache import Cache, capturing, stream
from trainkit.kernels._grid import flat
from trainkit.kernels._installed import lacking

LARGEST_HEAD = 256


class Tiling(NamedTuple):
    """Queries and keys a tile, and how the kernel is launched."""

    bm: int
    bn: int
    warps: int
    stages: int


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
    if not q.is_cuda and not interpreted():
        return f"Triton has no kernels on {q.device.type}"
    if q.dtype == torch.float64:
        return "fp64 is served by the reference"
    if max(q.shape[3], v.shape[3]) > LARGEST_HEAD:
        return f"kernels end at head_dim {LARGEST_HEAD}, got {max(q.shape[3], v.shape[3])}"
    return None


def _padded(d: int) -> int:
    return max(16, 1 << (d - 1).bit_length())


def _tiling(kind: str, d: int, dv: int, q: Tensor) -> Tiling:
    """Tile sizes by head dimension; `kind` is forward, keys or queries."""
    if not q.is_cuda:
        return Tiling(32, 32, 4, 1)
    wide = max(_padded(d), _padded(dv))
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


class Call(NamedTuple):
    """What forward and backward of one call share and that needs no gradient."""

    spec: Spec
    packed: Packed | None
    variant: Variant
    hopper: bool = False
    """Forward in Gluon, and backward too unless captured tensors learn."""
    rope: tuple[Tensor, Tensor] | None = None
    """fp32 tables by which the Hopper forward still has to turn the queries, as it loads them."""


def _rows(x: Tensor) -> Tensor:
    """A tensor whose last dimension is laid out densely."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides_of(x: Tensor) -> tuple[int, int, int]:
    return x.stride(0), x.stride(1), x.stride(2)


def packed_tiles(bounds: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """int32 `[tiles, 2]`: (sequence, tile) for each tile of `size` tokens, the sequences' last tiles first."""
    # For one stream alone, whose kernels have read it when its memory is used again: copying it waits for the device.
    key = None if capturing(device) else (bounds, size, device, stream(device))
    return _TILES.get(key, lambda: _packed_tiles(bounds, size, device))


_TILES: Cache[Tensor] = Cache(64)


def _packed_tiles(bounds: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    tiles = [(i, t) for i in range(len(bounds) - 1) for t in range(-(-(bounds[i + 1] - bounds[i]) // size))]
    tiles.sort(key=lambda pair: -pair[1])
    return torch.tensor(tiles, dtype=torch.int32, device=device).reshape(-1, 2)


def _common(call: Call, q: Tensor, k: Tensor, v: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Scalars in the order of every kernel's signature, and the compile-time constants all kernels share."""
    spec = call.spec
    scalars = (
        q.shape[2],
        q.shape[1],
        k.shape[1],
        spec.window or 0,
        spec.scale,
        spec.seed,
        threshold(spec.dropout_p),
        1.0 / (1.0 - spec.dropout_p),
        arguments(call.variant.score_tables),
        arguments(call.variant.mask_tables),
    )
    functions = call.variant.functions("triton")
    constants = {
        "GROUP": q.shape[2] // k.shape[2],
        "D": q.shape[3],
        "DV": v.shape[3],
        "BD": _padded(q.shape[3]),
        "BDV": _padded(v.shape[3]),
        "CAUSAL": spec.causal,
        "WINDOW": spec.window is not None,
        "SIGMOID": spec.sigmoid,
        "DROPOUT": spec.dropout_p > 0,
        "PACKED": call.packed is not None,
        "PRECISION": "tf32x3" if q.dtype == torch.float32 and q.is_cuda else "ieee",
        "SCORE": functions.score,
        "MASK": functions.mask,
    }
    return scalars, constants


def layout(call: Call, q: Tensor, k: Tensor, tiling: Tiling, by_keys: bool) -> tuple[Any, ...]:
    """(grid, pointer arguments TILES to FULL, block strides, LISTED) of a launch over tiles of one side."""
    size, tokens = (tiling.bn, k.shape[1]) if by_keys else (tiling.bm, q.shape[1])
    heads = k.shape[2] if by_keys else q.shape[2]
    if call.packed is not None:
        bounds = call.packed.bounds_k if by_keys else call.packed.bounds_q
        tiles = packed_tiles(bounds, size, q.device)
        pointers = (tiles, call.packed.cu_q, call.packed.cu_k, None, None, None)
        return (tiles.shape[0], heads, 1), pointers, (0, 0, 0), False
    grid = (-(-tokens // size), heads, q.shape[0])
    if call.variant.mask is None:
        return grid, (None,) * 6, (0, 0, 0), False
    shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
    blocks, counts, full, *strides = _block_lists.lists(
        _block_lists.Blocks(call.variant, call.spec, *shape, tiling.bm, tiling.bn, q.device, by_keys)
    )
    return grid, (None, None, None, blocks, counts, full), tuple(strides), True


def launch(kernel: Any, grid: tuple[int, ...], tiling: Tiling, *args: Any, **constants: Any) -> None:
    """Run a kernel with fewer pipeline stages if its shared memory does not fit: a variant's own loads take some."""
    from triton.runtime.errors import OutOfResources

    for stages in range(tiling.stages, 0, -1):
        try:
            kernel[flat(grid)](
                *args, grid[0], **constants, BM=tiling.bm, BN=tiling.bn, num_warps=tiling.warps, num_stages=stages
            )
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
    grid, pointers, strides, listed = layout(call, q, k, tiling, False)
    scalars, constants = _common(call, q, k, v)
    if 0 not in grid:
        launch(
            _triton_forward.forward, grid, tiling, q, k, v, out, lse, sinks, *pointers, *strides_of(q),
            *strides_of(k), *strides_of(v), *strides_of(out), *strides,
            *scalars, **constants, SINK=sinks is not None, LISTED=listed,
        )  # fmt: skip
    return out, lse


def row_delta(out: Tensor, grad: Tensor, grad_lse: Tensor | None) -> Tensor:
    """rowsum(out * grad) minus lse's gradient, fp32 `[B, H, Sq]`."""
    B, S, H, _ = out.shape
    delta = torch.empty(B, H, S, dtype=torch.float32, device=out.device)
    tensors = (out, grad, delta, *(() if grad_lse is None else (grad_lse.contiguous(),)))
    if delta.numel():
        forms = form(*tensors)
        PLANS.get(None if forms is None else ("delta", forms), lambda: _delta(*tensors))(tensors)
    return delta


def _delta(out: Tensor, grad: Tensor, _: Tensor, grad_lse: Tensor | None = None) -> Launch:
    from trainkit.kernels._attention import _triton_backward

    B, S, H, DV = out.shape
    bm = 64 if out.is_cuda else 32
    return Launch(
        _triton_backward.delta, (*flat((-(-S // bm), H, B)), 1, 1), (), (0, 1, None if grad_lse is None else 3, 2),
        (*strides_of(out), *strides_of(grad), H, S, -(-S // bm), DV, _padded(DV), bm, grad_lse is not None),
    )  # fmt: skip


def sink_gradient(sinks: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """`[Hq]`: the sink's weight in each row, times what the row's weights as a whole receive."""
    weight = torch.exp(sinks.float()[None, :, None] - lse).masked_fill(lse == -torch.inf, 0.0)
    return -(weight * delta).sum((0, 2)).to(sinks.dtype)


def backward(
    q: Tensor, k: Tensor, v: Tensor, lse: Tensor, grad: Tensor, delta: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Gradients of q, k, v, and of the captured tensors that learn (`call.variant.learned`); `delta` is `row_delta`."""
    from trainkit.kernels._attention import _triton_backward

    q, k, v, grad = _rows(q), _rows(k), _rows(v), _rows(grad)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    dq, dk, dv = _rows(dq), _rows(dk), _rows(dv)
    scalars, constants = _common(call, q, k, v)
    constants["GRAD"] = call.variant.functions("triton").score_grad
    inputs = (q, k, v, grad, lse, delta)
    steps = (*strides_of(q), *strides_of(k), *strides_of(v), *strides_of(grad))

    tiling = _tiling("keys", q.shape[3], v.shape[3], q)
    grid, pointers, strides, listed = layout(call, q, k, tiling, True)
    if 0 not in grid:
        launch(
            _triton_backward.backward_keys, grid, tiling, *inputs, dk, dv, *pointers, *steps, *strides_of(dk),
            *strides_of(dv), *strides, *scalars, **constants,
            LISTED=listed,
        )  # fmt: skip

    learned = call.variant.learned
    captured = call.variant.score_tables
    tables = [torch.zeros_like(t, dtype=torch.float32) for t in captured] if learned else []
    tiling = _tiling("queries", q.shape[3], v.shape[3], q)
    grid, pointers, strides, listed = layout(call, q, k, tiling, False)
    if 0 not in grid:
        launch(
            _triton_backward.backward_queries, grid, tiling, *inputs, dq, *pointers, *steps, *strides_of(dq),
            *strides, *scalars, arguments(tables), **constants,
            LISTED=listed, TABLES=bool(learned),
        )  # fmt: skip
    return dq, dk, dv, [tables[i].to(captured[i].dtype) for i in learned]
