"""Products of activations and quantised weights: the kernel with its tuned launch, or the reference where none can run."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from trainkit.kernels.fused._launch import fusible, on
from trainkit.kernels.lowbit._activation import Recipe
from trainkit.kernels.lowbit._packing import unpack
from trainkit.kernels.lowbit._reference import Quantised, grouped_product
from trainkit.kernels.lowbit._tuned import Tile, tile4, tile8


class Weight4(NamedTuple):
    """A packed weight of N rows."""

    codes: Tensor
    """`[main / 128, N, 64]` uint8, as `_packing` has it."""
    scales: Tensor
    """`[main / group, N]` bf16."""
    outliers: Tensor | None = None
    """`[N, O]` int8."""
    outlier_scales: Tensor | None = None
    """`[N]` bf16."""


_WORK: dict[torch.device, tuple[Tensor, Tensor]] = {}


def _workspace(device: torch.device, floats: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Room for partial sums, and locks that are 0 between launches; a captured graph gets its own."""
    from trainkit.kernels._cache import capturing

    known = _WORK.get(device)
    if known is None or known[0].numel() < floats or known[1].numel() < tiles or capturing(device):
        known = (
            torch.empty(max(floats, 1 << 20), device=device),
            torch.zeros(max(tiles, 4096), dtype=torch.int32, device=device),
        )
        if not capturing(device):
            _WORK[device] = known
    return known


def product4(
    x: Tensor | Quantised, weight: Weight4, *, recipe: Recipe | None, group: int, channels: int,
    bias: Tensor | None = None, dtype: torch.dtype | None = None, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """`x @ weight.T + bias`: `[M, N]`.

    Args:
        x: the input's codes; the 16-bit input `[M, K]` itself for W4A16.
        weight: packed.
        recipe: how x was quantised; None for W4A16.
        group: channels that share a scale of the weight.
        channels: K.
        bias: `[N]`.
        dtype: of the result; of x where that is 16-bit.
        tile: instead of the tuned one.
    """
    codes = x.codes if isinstance(x, Quantised) else x
    dtype = dtype or codes.dtype
    rows, (blocks, columns, _) = codes.shape[0], weight.codes.shape
    if not _runs(codes, dtype):
        return by_reference(x, weight, bias, dtype)
    scales, outliers, outlier_scales = x[1:] if isinstance(x, Quantised) else (None,) * 3
    codes = x.codes if isinstance(x, Quantised) else x
    codes = codes if codes.stride(-1) == 1 else codes.contiguous()
    y = torch.empty(rows, columns, dtype=dtype, device=codes.device)
    if rows == 0:
        return y
    tile = tile or tile4(rows, columns)
    tiles = -(-rows // tile.bm) * -(-columns // tile.bn)
    split = min(tile.split, blocks)
    part, lock = _workspace(codes.device, split * rows * columns, tiles) if split > 1 else (None, None)
    count = 0 if weight.outliers is None else weight.outliers.shape[1]
    chained = codes.is_cuda and recipe is not None
    from trainkit.kernels.lowbit import _w4_kernels as kernels

    with on(codes):
        kernels.linear[(tiles, split)](
            codes, scales, outliers, outlier_scales, weight.codes, weight.scales, weight.outliers,
            weight.outlier_scales, bias, y, part, lock, rows, columns, codes.stride(0), K=channels, MAIN=blocks * 128,
            OUT=count, GROUP=group, KIND="16" if recipe is None else recipe.kind, BIASED=bias is not None, BM=tile.bm,
            BN=tile.bn, SPLIT=split, SWIZZLE=tile.swizzle, STAGES=tile.stages, UNROLL=tile.unroll, ASM=codes.is_cuda,
            CHAINED=chained, num_warps=tile.warps, **({"launch_pdl": True} if chained else {}),
        )  # fmt: skip
    return y


def _runs(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the kernels serve it; the other tensors lie where x does."""
    probe = torch.empty(1, dtype=dtype, device=x.device)
    return fusible(probe)


def by_reference(x: Tensor | Quantised, weight: Weight4, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The same in PyTorch, in whole numbers."""
    codes = unpack(weight.codes)
    if isinstance(x, Tensor):
        plain = F.pad(x.float(), (0, codes.shape[1] - x.shape[1]))
        x = Quantised(plain, plain.new_ones(1, len(plain)))
    y = grouped_product(x.codes, x.scales, codes, weight.scales)
    if weight.outliers is not None and weight.outlier_scales is not None:
        assert x.outliers is not None and x.outlier_scales is not None
        y += grouped_product(x.outliers, x.outlier_scales[None], weight.outliers, weight.outlier_scales[None])
    return (y if bias is None else y + bias.float()).to(dtype)


def product8(
    x: Quantised, weight: Tensor, scales: Tensor, *, bias: Tensor | None = None, dtype: torch.dtype,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """`x @ weight.T + bias` of 8-bit codes (INT8, or both e4m3), weight `[N, K]` and its scales `[N]`: `[M, N]`."""
    rows, (columns, channels) = x.codes.shape[0], weight.shape
    if not _runs(weight, dtype):
        y = (x.codes.double() @ weight.double().t()).float() * (x.scales[0, :, None] * scales.float())
        return (y if bias is None else y + bias.float()).to(dtype)
    from trainkit.kernels.lowbit import _w8_kernels as kernels

    y = torch.empty(rows, columns, dtype=dtype, device=weight.device)
    if rows == 0:
        return y
    tile = tile or tile8(rows)
    tiles = -(-rows // tile.bm) * -(-columns // tile.bn)
    arguments: dict[str, Any] = {
        "BM": tile.bm,
        "BN": tile.bn,
        "BK": 128,
        "SWIZZLE": tile.swizzle,
        "STAGES": tile.stages,
    }
    with on(weight):
        kernels.linear[(tiles,)](
            x.codes, x.scales, weight, scales, bias, y, rows, columns, K=channels, BIASED=bias is not None, **arguments,
            num_warps=tile.warps,
        )  # fmt: skip
    return y
