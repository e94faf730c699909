"""How a plan's forward pass is launched."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from trainkit.kernels._attention import _triton
from trainkit.kernels._attention._call import Tiling
from trainkit.kernels._attention._codegen import arguments
from trainkit.kernels._attention._delta import padded
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._variant import Variant
from trainkit.kernels._launch import Template
from trainkit.kernels.paged._tables import Pages

PROGRAMS = 2
"""Programs a multiprocessor: while one ends a piece, the other loads."""
MERGED = 16384
"""Numbers of parts that a program holds at a time as it merges them: 128 registers a thread."""


class Arrays(NamedTuple):
    """A plan on the device, and the room in which its parts wait to be merged."""

    worker_indptr: Tensor
    pieces: Tensor
    tokens: Tensor
    merge_indptr: Tensor
    merge_rows: Tensor
    indices: Tensor
    parts: Tensor
    part_lse: Tensor
    counts: Tensor


def workers(device: torch.device) -> int:
    """Programs of a launch: all that the device holds at once."""
    if device.type != "cuda":
        return 4
    return PROGRAMS * torch.cuda.get_device_properties(device).multi_processor_count


def tiling(rows: int, head_dim: int, device: torch.device) -> Tiling:
    """Rows and keys of a block.

    Args:
        rows: that a tile can use.
    """
    if device.type != "cuda":
        return Tiling(16 if rows <= 16 else 32, 16, 4, 1)
    keys = 64 if head_dim <= 128 else 32
    return Tiling(16, keys, 4, 4) if rows <= 16 else Tiling(64, keys, 4, 3)


def constants(
    q: Tensor, pages: Pages, spec: Spec, variant: Variant, tiles: Tiling, sinks: bool, scaled: bool
) -> Template:
    """What the kernel is compiled for."""
    group, D, DV = q.shape[1] // pages.keys.shape[2], q.shape[2], pages.values.shape[3]
    functions = variant.functions("triton")
    bg = 1 << (group - 1).bit_length()
    return Template(
        GROUP=group, BG=bg, KV_HEADS=pages.keys.shape[2], D=D, DV=DV, BD=padded(D), BDV=padded(DV), BM=tiles.bm, BN=tiles.bn,
        BT=1 << (tiles.bm // group - 1).bit_length(), PB=max(1, min(32, MERGED // (bg * padded(DV)))), CAUSAL=spec.causal,
        WINDOW=spec.window is not None, SIGMOID=False, DROPOUT=False, BLOCK_SPARSE=False, PAGE=pages.page_size,
        PRECISION="tf32x3" if q.dtype == torch.float32 and q.is_cuda else "ieee", SCORE=functions.score, MASK=None, SINK=sinks,
        SCALED=scaled, SMALL=tiles.bm == 16,
    )  # fmt: skip


def view(x: Tensor) -> tuple[Any, ...]:
    """A tensor `[.., tokens, heads, D]` as the kernel takes it: pointer, strides."""
    return x, *x.stride()[:-1]


def forward(
    q: Tensor, pages: Pages, spec: Spec, variant: Variant, tiles: Tiling, arrays: Arrays,
    scales: tuple[Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return out `[tokens, Hq, Dv]` and lse `[tokens, Hq]`."""
    from trainkit.kernels.paged import _kernels

    out = torch.empty(*q.shape[:2], pages.values.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[1], dtype=torch.float32, device=q.device)
    made = constants(q, pages, spec, variant, tiles, spec.sinks is not None, scales[0] is not None)
    grid = (arrays.worker_indptr.shape[0] - 1,)
    _triton.run(
        _kernels.paged, grid, tiles, view(q), view(pages.keys), view(pages.values), view(out), lse, spec.sinks, *arrays[:3],
        arrays.indices, arrays.parts, arrays.part_lse, arrays.merge_indptr, arrays.merge_rows, arrays.counts, *scales,
        q.shape[1], spec.window or 0, spec.scale, arguments(variant.score_tables), made,
    )  # fmt: skip
    return out, lse
