"""The blocks of a mask that a tile visits, and the bits of the partial ones: made once a mask, shape and tiling."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from trainkit.kernels._attention._codegen import arguments
from trainkit.kernels._attention._spec import Spec
from trainkit.kernels._attention._variant import Variant
from trainkit.kernels._cache import Cache, capturing, contents, identity, stream
from trainkit.kernels._grid import flat

V = TypeVar("V")

LARGEST = 64 << 20
"""Bytes of one mask's bits: masks with more partial blocks are evaluated by every call."""
KEPT: Cache[Any] = Cache(1024, most_bytes=256 << 20)
"""Lists, bits, and launches that hold them."""


class Lists(NamedTuple):
    """Blocks to visit for each tile of one side, the full ones first."""

    blocks: Tensor
    """int32 `[B|1 * H|1, tiles, blocks a tile at most]`."""
    counts: Tensor
    """int32 `[B|1 * H|1, tiles]`: how many of them are not empty."""
    full: Tensor
    """int32 `[B|1 * H|1, tiles]`: how many of those are full."""
    stride_b: int
    stride_h: int
    width: int

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes + self.counts.nbytes + self.full.nbytes


class Bits(NamedTuple):
    """What is seen of partial blocks; see `bits`."""

    first: Tensor
    words: Tensor

    @property
    def nbytes(self) -> int:
        return self.first.nbytes + self.words.nbytes


class Blocks(NamedTuple):
    """A mask's blocks: of which call, in which tiling.

    Args:
        by_keys: list query blocks for each tile of keys (the reverse otherwise).
    """

    variant: Variant
    spec: Spec
    B: int
    H: int
    Sq: int
    Sk: int
    BM: int
    BN: int
    device: torch.device
    by_keys: bool

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.spec.causal, self.spec.window, *self[2:8], self.by_keys)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Queries, keys and the window, as the kernels take them."""
        return self.Sq, self.Sk, self.spec.window or 0

    @property
    def masks(self) -> tuple[int, int]:
        """Over how many batch entries and heads the mask varies."""
        varies = self.variant.mask_varies_with
        return (self.B if "b" in varies else 1), (self.H if "h" in varies else 1)

    @property
    def mask(self) -> tuple[Any, ...]:
        """Causal, window and mask_mod, as the kernels take them."""
        return self.spec.causal, self.spec.window is not None, self.variant.functions("triton").mask


def kept(
    variant: Variant, device: torch.device, key: Any, make: Callable[[], V], nbytes: Callable[[V], int] | None = None
) -> V:
    """What `make` returned for this variant and key on this stream, as long as what the mask captured does not change."""
    masks = [contents(t) for t in variant.mask_tables]
    if capturing(device) or any(x is None for x in masks):
        return make()
    scores = [identity(t) for t in variant.score_tables]
    full = (id(variant.traced), key, stream(device), *masks, *scores)
    objects = (variant.traced, *variant.mask_tables, *variant.score_tables)
    return KEPT.get(full, make, objects, nbytes)  # type: ignore[no-any-return]


def lists(wanted: Blocks) -> Lists:
    """Blocks to visit for each tile."""
    return kept(wanted.variant, wanted.device, wanted.key, lambda: _lists(wanted), lambda made: made.nbytes)


def _lists(x: Blocks) -> Lists:
    from trainkit.kernels._attention._blocks import block_map

    b, h = x.masks
    down, across = -(-x.Sq // x.BM), -(-x.Sk // x.BN)
    states = torch.empty(b * h, down, across, dtype=torch.int32, device=x.device)
    block_map[flat((across, down, b * h))](
        states, *x.sizes, arguments(x.variant.mask_tables), h, down, across, x.BM, x.BN, *x.mask
    )
    if x.by_keys:
        states = states.mT
    blocks = torch.argsort(states, dim=-1, descending=True, stable=True).to(torch.int32).contiguous()
    rows = blocks.shape[1]
    counts, full = ((states >= n).sum(-1, dtype=torch.int32).contiguous() for n in (1, 2))
    return Lists(blocks, counts, full, h * rows if b > 1 else 0, rows if h > 1 else 0, blocks.shape[2])


def bits(wanted: Blocks) -> Bits | None:
    """What is seen of the blocks of `lists` that are partial, or None: the mask is to be evaluated.

    The rest of a row of tiles that is listed, from its `full`-th block on, has its bits in `words[first[row]]` and those
    that follow; a row without any block has one that shows nothing. `words[0]` shows all. A block of 2 KB at most holds
    for each of its lines (queries, by keys: keys) four words, one for each lane that shares the line of a wgmma's
    accumulator: bit 2 j + e of lane l is column 8 j + 2 l + e. Causal, window and ends are in them.

    Made with the list, kept with it, and not made where they would be too many, nor in a captured graph: the host waits
    for their number.
    """
    if capturing(wanted.device):
        return None
    return kept(
        wanted.variant,
        wanted.device,
        (*wanted.key, "bits"),
        lambda: _bits(wanted),
        lambda made: made.nbytes if made else 0,
    )


def _bits(x: Blocks) -> Bits | None:
    from trainkit.kernels._attention._blocks import pack

    blocks, counts, full, *_, width = lists(x)
    tall, wide = (x.BN, x.BM) if x.by_keys else (x.BM, x.BN)
    partly = counts.clamp(min=1) - full
    ends = partly.flatten().cumsum(0, dtype=torch.int64)
    total = int(ends[-1]) + 1
    if total * tall * 16 > LARGEST:
        return None
    first = (ends.view_as(partly) - partly + 1).to(torch.int32)
    words = torch.empty(total, tall, 4, dtype=torch.int32, device=x.device)
    words[0] = -1
    _, h = x.masks
    pack[flat((width, blocks.shape[1], blocks.shape[0]))](
        words, first, blocks, counts, full, *x.sizes, arguments(x.variant.mask_tables), h, blocks.shape[1], width, tall, wide,
        x.by_keys, *x.mask,
    )  # fmt: skip
    return Bits(first, words)
