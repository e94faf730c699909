"""Which ranks meet in a collective, when, and over what share of the message: as gloo and NCCL run it."""

from itertools import combinations, pairwise
from typing import NamedTuple

from trainkit.collectives.order._check import OrderError
from trainkit.collectives.trees._classic import binary_trees


class Stage(NamedTuple):
    """Exchanges that run at the same time, each both ways."""

    weight: float
    """Share of the message that each carries."""
    pairs: list[tuple[int, int]]
    """Ranks that meet."""


class Trees(NamedTuple):
    """Trees over all ranks, each with its share of the message."""

    weight: float
    """Share of the message on each tree."""
    parents: list[list[int]]
    """Tree -> rank -> parent, -1 at the root."""

    def depths(self) -> list[int]:
        """Hops of each rank below the root of the first tree; the others have as many ranks at every depth."""
        parent = self.parents[0]
        depths = []
        for rank in range(len(parent)):
            hops = 0
            while parent[rank] >= 0:
                rank, hops = parent[rank], hops + 1
            depths.append(hops)
        return depths


def halving_doubling(size: int) -> list[Stage]:
    """Reduce-scatter of gloo's `AllreduceHalvingDoubling`; the all-gather runs through it backwards.

    Step i exchanges 2^-(i+1) of the message with the rank whose number differs in bit i. A size that is no power of two
    is cut into blocks that are, the largest first; each hands its results on to the next larger one.
    """
    blocks, start = [], 0
    for power in range(size.bit_length() - 1, -1, -1):
        if size >> power & 1:
            blocks.append((start, power))
            start += 1 << power
    stages = []
    for step in range(blocks[0][1]):
        ranks = [r for start, power in blocks if power > step for r in range(start, start + (1 << power))]
        stages.append(Stage(2.0 ** -(step + 1), [(r, r ^ 1 << step) for r in ranks if r < r ^ 1 << step]))
    for (large, power), (small, less) in reversed(list(pairwise(blocks))):
        pairs = [(large + at, small + at % (1 << less)) for at in range(1 << power)]
        stages.append(Stage(2.0**-power, pairs))
    return stages


def bcube(size: int, base: int) -> list[Stage]:
    """Reduce-scatter of gloo's BCube all-reduce (`AllreduceOptions::Algorithm::BCUBE`, whose base is 2).

    Groups of `base` ranks at strides base^k, as long as the size divides; the last group takes what is left of it.
    """
    if base < 2:
        raise OrderError(f"base, the hosts in a group of BCube, must be at least 2, got {base}")
    groups, left = [], size
    while left % base == 0:
        groups.append(base)
        left //= base
    if left > 1:
        groups.append(left)
    stages, stride = [], 1
    for group in groups:
        starts = [r for r in range(size) if r // stride % group == 0]
        pairs = [pair for r in starts for pair in combinations(range(r, r + group * stride, stride), 2)]
        stages.append(Stage(1 / (stride * group), pairs))
        stride *= group
    return stages


def double_binary_tree(size: int) -> Trees:
    """NCCL's two trees (`ncclGetDtree`), each with half of the message."""
    return Trees(0.5, [[-1 if up is None else up for up in tree] for tree in binary_trees(size)])
