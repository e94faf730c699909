# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Block sparsity: which tiles of a mask are empty, partly or wholly seen, lists of the others a tile of one side, and the
bits of those seen in part.
"""

import weakref

import torch
import triton
import triton.language as tl

from trainkit.kernels._attention._codegen import arguments
from trainkit.kernels._attention._triton_tiles import visible

LARGEST = 64 << 20
"""Bytes of one mask's bits: masks with more blocks seen in part are evaluated by every call."""
MOST = 256 << 20
"""Bytes of all bits kept."""


@triton.jit
def in_sight(q, k, z, Sq, Sk, w, args, H, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr):
    """Which queries see which keys, in the z-th of the masks of B * H heads; `q` and `k` lie along the sides of a tile."""
    off = Sk - Sq
    inside = tl.minimum(q, Sq - 1)
    seen = visible(inside, k, Sk, off, w, CAUSAL, WINDOW)
    seen = seen & MASK(z // H, z % H, inside, tl.minimum(k, Sk - 1), off, args)
    # A tile over the end of either side is never whole: whole ones are loaded without bounds.
    return seen & (q < Sq)


@triton.jit(do_not_specialize=["Sq", "Sk", "w"])
def block_map(MAP, Sq, Sk, w, args, H, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
              MASK: tl.constexpr):  # fmt: skip
    """MAP `[B * H, tiles of queries, tiles of keys]`, int32: 0 unseen, 1 in part, 2 whole."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    cols = tl.program_id(1) * BN + tl.arange(0, BN)
    seen = in_sight(rows[:, None], cols[None, :], tl.program_id(2), Sq, Sk, w, args, H, CAUSAL, WINDOW, MASK)
    state = tl.max(tl.max(seen.to(tl.int32), 1), 0) + tl.min(tl.min(seen.to(tl.int32), 1), 0)
    at = (tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    tl.store(MAP + at, state)


@triton.jit(do_not_specialize=["Sq", "Sk", "w"])
def pack(WORDS, FIRST, BLOCKS, COUNTS, FULL, Sq, Sk, w, args, H, TALL: tl.constexpr, WIDE: tl.constexpr,
         BY_KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """The bits of one listed block, if they are wanted: see `bits`."""
    n = tl.program_id(1)
    z = tl.program_id(2)
    row = z * tl.num_programs(0) + tl.program_id(0)
    full = tl.load(FULL + row)
    if (n >= full) & (n < tl.maximum(tl.load(COUNTS + row), 1)):
        block = tl.load(BLOCKS + row.to(tl.int64) * tl.num_programs(1) + n)
        lines = tl.arange(0, TALL)
        # Columns in the order of the bits.
        place = tl.arange(0, WIDE)
        bit = place % (WIDE // 4)
        down = (tl.program_id(0) * TALL + lines)[:, None]
        across = (block * WIDE + bit // 2 * 8 + place // (WIDE // 4) * 2 + bit % 2)[None, :]
        if BY_KEYS:
            seen = in_sight(across, down, z, Sq, Sk, w, args, H, CAUSAL, WINDOW, MASK)
        else:
            seen = in_sight(down, across, z, Sq, Sk, w, args, H, CAUSAL, WINDOW, MASK)
        words = tl.sum(tl.reshape(seen.to(tl.int32) << bit[None, :], [TALL, 4, WIDE // 4]), 2)
        at = (tl.load(FIRST + row) + n - full) * TALL + lines
        tl.store(WORDS + at[:, None] * 4 + tl.arange(0, 4)[None, :], words)


_KEPT = weakref.WeakKeyDictionary()
_HELD = {}
"""Bytes of the bits in `_KEPT`, by mask and key, the oldest first."""


def _capturing(device):
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def kept(variant, device, key, make):
    """What `make` returned for this variant and key, as long as the tensors that its mask captured do not change."""
    if _capturing(device):
        # A captured graph outlives what is kept here, and is replayed on tensors that have changed.
        return make()
    versions = () if variant.mask is None else tuple(t._version for t in variant.mask.tables)
    known = _KEPT.get(variant)
    if known is None or known[0] != versions:
        known = _KEPT[variant] = (versions, {})
    if key not in known[1]:
        known[1][key] = make()
    return known[1][key]


def lists(variant, spec, B, H, Sq, Sk, BM, BN, device, by_keys):
    """Blocks to visit a tile: (blocks, counts, full, stride of b, stride of h, blocks a tile).

    Computed once a mask, shape and tiling, as long as the tensors that the mask captured do not change.

    Args:
        by_keys: list query blocks for each tile of keys (the reverse otherwise).
    """

    def make():
        varies = variant.mask_varies_with
        b, h = (B if "b" in varies else 1), (H if "h" in varies else 1)
        tiles = triton.cdiv(Sq, BM), triton.cdiv(Sk, BN)
        states = torch.empty(b * h, *tiles, dtype=torch.int32, device=device)
        mask = variant.functions("triton").mask
        block_map[(*tiles, b * h)](
            states, Sq, Sk, spec.window or 0, arguments(variant.mask), h, BM, BN, spec.causal,
            spec.window is not None, mask
        )  # fmt: skip
        if by_keys:
            states = states.mT
        blocks = torch.argsort(states, dim=-1, descending=True, stable=True).to(torch.int32).contiguous()
        rows = blocks.shape[1]
        strides = (h * rows if b > 1 else 0), (rows if h > 1 else 0)
        counts, full = ((states >= n).sum(-1, dtype=torch.int32).contiguous() for n in (1, 2))
        return blocks, counts, full, *strides, blocks.shape[2]

    return kept(variant, device, (spec.causal, spec.window, B, H, Sq, Sk, BM, BN, by_keys), make)


def bits(variant, spec, B, H, Sq, Sk, BM, BN, device, by_keys):
    """What is seen of the blocks of `lists` that are seen in part: (first, words), or None: the mask is to be evaluated.

    The rest of a row of tiles that is listed, from its `full`-th block on, has its bits in `words[first[row]]` and those
    that follow; a row without any block has one that shows nothing. `words[0]` shows all. A block of 2 KB at most holds
    for each of its lines (queries, by keys: keys) four words, one for each lane that shares the line of a wgmma's
    accumulator: bit 2 j + e of lane l is column 8 j + 2 l + e. Causal, window and ends are in them.

    Made with the list, kept with it, and not made where they would be too many, nor in a captured graph: the host waits
    for their number.
    """
    key = (spec.causal, spec.window, B, H, Sq, Sk, BM, BN, by_keys, "bits")

    def make():
        if _capturing(device):
            return None
        blocks, counts, full, *_, width = lists(variant, spec, B, H, Sq, Sk, BM, BN, device, by_keys)
        tall, wide = (BN, BM) if by_keys else (BM, BN)
        partly = counts.clamp(min=1) - full
        ends = partly.flatten().cumsum(0, dtype=torch.int32)
        total = int(ends[-1]) + 1
        nbytes = total * tall * 16
        if nbytes > LARGEST:
            return None
        first = ends.view_as(partly) - partly + 1
        words = torch.empty(total, tall, 4, dtype=torch.int32, device=device)
        words[0] = -1
        h = H if "h" in variant.mask_varies_with else 1
        pack[(blocks.shape[1], width, blocks.shape[0])](
            words, first, blocks, counts, full, Sq, Sk, spec.window or 0, arguments(variant.mask), h, tall, wide, by_keys,
            spec.causal, spec.window is not None, variant.functions("triton").mask,
        )  # fmt: skip
        _hold(variant, key, nbytes)
        return first, words

    return kept(variant, device, key, make)


def _hold(variant, key, nbytes):
    """Account for bits that will be kept; where all are too many drop the oldest, and what else that mask keeps."""
    owner = weakref.ref(variant)
    _HELD.pop((owner, key), None)
    _HELD[owner, key] = nbytes
    while sum(_HELD.values()) > MOST and len(_HELD) > 1:
        oldest = next(iter(_HELD))[0]
        for old in [x for x in _HELD if x[0] == oldest and x != (owner, key)]:
            del _HELD[old]
        known = _KEPT.get(oldest()) if oldest() is not None else None
        if known is not None:
            # Launches hold the bits, too.
            known[1].clear()
