"""What a matrix of costs must be."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Costs = npt.NDArray[np.float64]


class OrderError(ValueError):
    """A matrix of costs, an order or a plan that breaks a rule."""


def checked_costs(cost: Any, what: str = "cost", size: int | None = None) -> Costs:
    """The matrix as float64, C-contiguous.

    Args:
        cost: anything numpy reads, `[N, N]`: entry (i, j) is what going from host i to host j costs.
        what: its name in messages.
        size: the N that it must have.

    Raises:
        OrderError: not square, not finite, negative, or a diagonal that is not 0.
    """
    try:
        matrix = np.ascontiguousarray(cost, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise OrderError(f"{what} must be a matrix of numbers: {error}") from None
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or matrix.shape[0] < 1:
        raise OrderError(f"{what} must be square, one row and one column a host, got shape {list(matrix.shape)}")
    if size is not None and len(matrix) != size:
        raise OrderError(f"{what} must have the {size} hosts that cost has, got {len(matrix)}")
    for rule, wrong in (
        ("finite: measure the pair, or give a cost that rules it out", ~np.isfinite(matrix)),
        ("at least 0", matrix < 0),
        ("0 on the diagonal, where a host meets itself", np.eye(len(matrix), dtype=bool) & (matrix != 0)),
    ):
        if wrong.any():
            i, j = np.argwhere(wrong)[0]
            raise OrderError(f"{what} must be {rule}; from host {i} to host {j} it is {matrix[i, j]}")
    return matrix


def checked_order(order: Sequence[int] | npt.NDArray[np.integer[Any]], size: int) -> tuple[int, ...]:
    """The order as a tuple: rank -> host.

    Raises:
        OrderError: not every host exactly once.
    """
    hosts = tuple(int(host) for host in order)
    if sorted(hosts) != list(range(size)):
        raise OrderError(f"an order names each of the hosts 0 to {size - 1} once, got {list(hosts)[:16]}")
    return hosts


def slower_way(matrix: Costs) -> Costs:
    """What an exchange between two hosts costs: that of its slower direction."""
    return np.maximum(matrix, matrix.T)
