"""Sizes of launches by shape, from `benchmarks/kernels/lowbit_tune.py` on one H200."""

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
    """Blocks of 128 channels a turn of the loop."""


def tile4(rows: int, columns: int, channels: int, kind: str) -> Tile:
    """For packed weights."""
    if rows <= 16:
        return Tile(16, 64, 4, 4, 4, 8)
    if rows <= 64:
        return Tile(64, 64, 2, 4, 4, 8)
    return Tile(128, 64, 1, 4, 4, 8)


def tile8(rows: int, columns: int, channels: int) -> Tile:
    """For 8-bit weights."""
    if rows <= 16:
        return Tile(16, 64, 1, 4, 4, 8)
    if rows <= 64:
        return Tile(64, 64, 1, 4, 4, 8)
    return Tile(128, 128, 1, 3, 8, 8)
