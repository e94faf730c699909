# mypy: ignore-errors
# (Triton's language, which Python's types do not describe.)
"""Block sparsity: which blocks of a mask are empty, partial or full, lists of the others for each tile of one side, and the
bits of the partial ones.
"""

import triton
import triton.language as tl

from trainkit.kernels._attention._triton_tiles import visible


@triton.jit
def in_sight(q, k, z, Sq, Sk, w, args, H, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr):
    """Which queries see which keys, in the z-th of the masks of B * H heads; `q` and `k` lie along the sides of a tile."""
    off = Sk - Sq
    inside = tl.minimum(q, Sq - 1)
    seen = visible(inside, k, Sk, off, w, CAUSAL, WINDOW)
    seen = seen & MASK(z // H, z % H, inside, tl.minimum(k, Sk - 1), off, args)
    # A tile over the end of either side is never whole: whole ones are loaded without bounds.
    return seen & (q < Sq)


@triton.jit(do_not_specialize=["Sq", "Sk", "w", "down", "across"])
def block_map(MAP, Sq, Sk, w, args, H, down, across, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr,
              WINDOW: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """MAP `[B * H, down, across]`, blocks of queries and of keys, int32: 0 empty, 1 partial, 2 full."""
    pid = tl.program_id(0)
    rows = pid // across % down * BM + tl.arange(0, BM)
    cols = pid % across * BN + tl.arange(0, BN)
    seen = in_sight(rows[:, None], cols[None, :], pid // across // down, Sq, Sk, w, args, H, CAUSAL, WINDOW, MASK)
    state = tl.max(tl.max(seen.to(tl.int32), 1), 0) + tl.min(tl.min(seen.to(tl.int32), 1), 0)
    tl.store(MAP + pid, state)


@triton.jit(do_not_specialize=["Sq", "Sk", "w", "tiles", "width"])
def pack(WORDS, FIRST, BLOCKS, COUNTS, FULL, Sq, Sk, w, args, H, tiles, width, TALL: tl.constexpr, WIDE: tl.constexpr,
         BY_KEYS: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, MASK: tl.constexpr):  # fmt: skip
    """The bits of one listed block, if they are wanted: see `_block_lists.bits`."""
    row = tl.program_id(0) // width
    n = tl.program_id(0) % width
    z = row // tiles
    full = tl.load(FULL + row)
    if (n >= full) & (n < tl.maximum(tl.load(COUNTS + row), 1)):
        block = tl.load(BLOCKS + tl.program_id(0))
        lines = tl.arange(0, TALL)
        # Columns in the order of the bits.
        place = tl.arange(0, WIDE)
        bit = place % (WIDE // 4)
        down = (row % tiles * TALL + lines)[:, None]
        across = (block * WIDE + bit // 2 * 8 + place // (WIDE // 4) * 2 + bit % 2)[None, :]
        if BY_KEYS:
            seen = in_sight(across, down, z, Sq, Sk, w, args, H, CAUSAL, WINDOW, MASK)
        else:
            seen = in_sight(down, across, z, Sq, Sk, w, args, H, CAUSAL, WINDOW, MASK)
        words = tl.sum(tl.reshape(seen.to(tl.int32) << bit[None, :], [TALL, 4, WIDE // 4]), 2)
        at = (tl.load(FIRST + row) + n - full) * TALL + lines
        tl.store(WORDS + at[:, None] * 4 + tl.arange(0, 4)[None, :], words)
