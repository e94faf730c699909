"""Sizes of launches by shape, from `benchmarks/kernels/lowbit_tune.py` on one H200 (2026-12-01)."""

from typing import NamedTuple


class Tile(NamedTuple):
    """One launch's sizes."""

    bm: int
    """Tokens a program."""
    bn: int
    """Weight rows a program."""
    split: int
    """Programs that share a tile's channels."""
    stages: int
    warps: int
    swizzle: int
    """Tiles of tokens that run beside each other."""
    unroll: int = 1
    """Units of channels a turn of the loop."""


FEW = 8192
"""Weight rows up to which a tile's channels are shared, so that all multiprocessors have work."""


def tile4(rows: int, columns: int) -> Tile:
    """For packed weights: M tokens by N weight rows."""
    few = columns <= FEW
    if rows <= 8:
        return Tile(8, 64, 4, 3, 4, 8)
    if rows <= 16:
        return Tile(16, 64, 4 if few else 1, 3, 4, 8)
    if rows <= 64:
        return Tile(32, 64, 1, 3, 4, 8) if few or rows <= 32 else Tile(64, 64, 1, 3, 4, 8)
    if rows <= 256 and few:
        return Tile(128, 64, 2, 3, 4, 8)
    return Tile(128, 64, 1, 4, 4, 8)


def tile8(rows: int) -> Tile:
    """For 8-bit weights; sizes by rule, not by search."""
    if rows <= 16:
        return Tile(16, 64, 1, 4, 4, 8)
    if rows <= 64:
        return Tile(64, 64, 1, 4, 4, 8)
    return Tile(128, 128, 1, 3, 8, 8)
