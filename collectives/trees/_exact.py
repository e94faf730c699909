"""Exact solutions of linear systems, near a float guess where the system leaves a choice."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

Row = dict[int, int]


def solve_near(rows: Sequence[tuple[Row, int]], guess: Any) -> list[Fraction]:
    """Solve `sum(row[at] * x[at]) = right` for all rows by elimination.

    Args:
        rows: (coefficients, right side); a row that contradicts those before it is left out.
        guess: float value of every unknown; unknowns that the rows leave free take the nearest simple fraction.

    Returns:
        One exact value per unknown.
    """
    pivots: dict[int, tuple[dict[int, Fraction], Fraction]] = {}
    for row, right in sorted(rows, key=lambda entry: len(entry[0])):
        left = {at: Fraction(value) for at, value in row.items()}
        rest = Fraction(right)
        for at in [at for at in left if at in pivots]:
            factor = left.get(at, Fraction(0))
            if factor == 0:
                continue
            for other, value in pivots[at][0].items():
                changed = left.get(other, Fraction(0)) - factor * value
                if changed:
                    left[other] = changed
                else:
                    left.pop(other, None)
            rest -= factor * pivots[at][1]
        if not left:
            continue
        # The unknown with the largest guess is solved for; keep every pivot row free of the other pivots.
        pivot = max(left, key=lambda at: (abs(guess[at]), -at))
        scale = left[pivot]
        left = {at: value / scale for at, value in left.items()}
        rest /= scale
        for at, (other_left, other_rest) in list(pivots.items()):
            factor = other_left.get(pivot, Fraction(0))
            if factor == 0:
                continue
            merged = dict(other_left)
            for other, value in left.items():
                changed = merged.get(other, Fraction(0)) - factor * value
                if changed:
                    merged[other] = changed
                else:
                    merged.pop(other, None)
            pivots[at] = (merged, other_rest - factor * rest)
        pivots[pivot] = (left, rest)
    solved = [
        Fraction(0) if at in pivots else Fraction(float(g)).limit_denominator(10**4) for at, g in enumerate(guess)
    ]
    for pivot, (left, rest) in pivots.items():
        solved[pivot] = rest - sum((c * solved[at] for at, c in left.items() if at != pivot), Fraction(0))
    return solved
