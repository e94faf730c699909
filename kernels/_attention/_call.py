"""One call of the kernels: what forward and backward share, and which work its programs do; for both dialects."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainkit.kernels._attention import _block_lists
from trainkit.kernels._attention._spec import Packed, Spec
from trainkit.kernels._attention._variant import Variant
from trainkit.kernels._attention._work import ITEM
from trainkit.kernels._cache import Cache, capturing, stream

ALL_KEYS = (1 << 31) - 1


class Call(NamedTuple):
    """What forward and backward of one call share and that needs no gradient."""

    spec: Spec
    packed: Packed | None
    variant: Variant
    hopper: bool = False
    """Forward in Gluon, and backward too unless captured tensors learn."""
    rope: tuple[Tensor, Tensor] | None = None
    """fp32 tables by which the Hopper forward still has to turn the queries, as it loads them."""


class Tiling(NamedTuple):
    """Queries and keys a tile, and how the kernel is launched."""

    bm: int
    bn: int
    warps: int
    stages: int


def packed_tiles(bounds: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    """int32 `[tiles, 5]`: the work on each tile of `size` tokens, the sequences' last tiles first.

    A row is a request (here a packed sequence), a tile of it, the first of the keys it is to see, the one after the last,
    and which part of the result that is, where several programs share one.
    """
    # For one stream alone, whose kernels have read it when its memory is used again: copying it waits for the device.
    key = None if capturing(device) else (bounds, size, device, stream(device))
    return _TILES.get(key, lambda: _packed_tiles(bounds, size, device))


_TILES: Cache[Tensor] = Cache(64)


def _packed_tiles(bounds: tuple[int, ...], size: int, device: torch.device) -> Tensor:
    tiles = [(i, t) for i in range(len(bounds) - 1) for t in range(-(-(bounds[i + 1] - bounds[i]) // size))]
    tiles.sort(key=lambda pair: -pair[1])
    work = [n for i, t in tiles for n in (i, t, 0, ALL_KEYS, 0)]
    return from_host(work, device).reshape(-1, ITEM)


_PINNED: list[Tensor] = []
"""What captured graphs copy from at each replay."""


def from_host(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Numbers as an int32 tensor; in a graph that is being captured, copied at every replay."""
    x = torch.tensor(numbers, dtype=torch.int32)
    if not capturing(device):
        return x.to(device)
    x = x.pin_memory()
    _PINNED.append(x)
    return x.to(device, non_blocking=True)


def layout(call: Call, q: Tensor, k: Tensor, tiling: Tiling, by_keys: bool) -> tuple[Any, ...]:
    """(grid, pointer arguments ITEMS to FULL, block strides, block-sparse) of a launch over tiles of one side."""
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
