"""Grids of launches: one dimension, and what a GPU allows there."""

import math

MOST = (1 << 31) - 1
"""Programs of a launch in its first dimension; the others hold 65,535."""


def flat(grid: tuple[int, ...]) -> tuple[int]:
    """A grid in one dimension, the first of its own varying fastest.

    Raises:
        ValueError: more programs than a launch holds.
    """
    programs = math.prod(grid)
    if programs > MOST:
        raise ValueError(f"a kernel runs at most {MOST} programs, got {programs}: split the batch")
    return (programs,)
