"""What every way of moving a schedule's slices offers."""

from collections.abc import Iterable
from typing import Protocol

import torch

from trainkit.collectives.execute._program import Program


class Work(Protocol):
    """A collective that runs."""

    def wait(self) -> None:
        """Return when it is complete here.

        Raises:
            ExecutionError: it failed, or the deadline passed.
        """


class Transport(Protocol):
    """A way of moving slices."""

    def prepare(self, peers: Iterable[int]) -> None:
        """Meet the ranks of a schedule; all of them do so at the same time."""

    def start(self, program: Program, buffer: torch.Tensor) -> Work:
        """Begin a collective, in place on a contiguous buffer."""

    @property
    def broken(self) -> bool:
        """Whether a collective has failed; no other runs after it."""

    def counters(self) -> dict[str, int]:
        """What it has moved."""

    def close(self) -> None:
        """Let everything go; does nothing the second time."""
