"""What every transport of a schedule's slices offers."""

from collections.abc import Iterable
from typing import Protocol

import torch

from trainkit.collectives.execute._program import Program


class Work(Protocol):
    """A collective that runs."""

    def wait(self) -> None:
        """Return when it is complete here.

        Raises:
            ExecutionError: it failed, or nothing moved for the time-out.
        """


class Transport(Protocol):
    """Moves slices."""

    def prepare(self, peers: Iterable[int]) -> None:
        """Meet the ranks of a schedule; all of them do so at the same time."""

    def start(self, program: Program, buffer: torch.Tensor, call: int = 0) -> Work:
        """Begin a collective, in place on a contiguous buffer; ranks with another `call` are refused."""

    def awaited(self) -> int | None:
        """A rank that a running collective waits for; None where none does or it is not known."""

    @property
    def broken(self) -> bool:
        """Whether a collective has failed; no other runs after it."""

    def counters(self) -> dict[str, int]:
        """What it has moved."""

    def close(self) -> None:
        """Let everything go; does nothing the second time."""
