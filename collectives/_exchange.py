"""A few words between the ranks of a job, as JSON through torch's store: nothing that arrives is ever executed."""

import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

MOST_BYTES = 256 << 20
"""What a message may be; the trees of a thousand ranks are some ten million bytes."""
_LOOK_S = 0.5
_counts: Counter[str] = Counter()  # stores made of each process group: the same number on all ranks


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None:
        """Publish."""

    def get(self, key: str) -> bytes:
        """Wait for a value."""

    def check(self, keys: list[str]) -> bool:
        """Whether the keys are there."""

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait until the keys are there; a RuntimeError after `timeout`."""

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        """Set a key that has not been set (expected ""); what it then holds."""

    def delete_key(self, key: str) -> bool:
        """Forget a key."""


class RankMissing(RuntimeError):
    """A rank has not said in time what the others wait for.

    Attributes:
        rank: the rank that is missing.
    """

    def __init__(self, message: str, rank: int) -> None:
        super().__init__(message)
        self.rank = rank


@dataclass(frozen=True)
class Placement:
    """This process among the ranks of a process group."""

    group: Any
    """Process group or backend: point-to-point messages of the transports "gloo" and "nccl"."""
    store: Store
    """Shared by the ranks of this placement and by nobody else."""
    rank: int
    """This process."""
    size: int
    """How many there are."""

    @staticmethod
    def of(process_group: "ProcessGroup | None", what: str = "schedules") -> "Placement":
        """In a process group; None is the default one. All its ranks call this in the same order.

        Args:
            process_group: the ranks.
            what: needs them; for the error.

        Raises:
            ValueError: torch.distributed is not initialised, or this process is not in the group.
        """
        import torch.distributed as dist

        if not dist.is_initialized():
            raise ValueError(f"{what} need ranks: call torch.distributed.init_process_group first")
        group = dist.group.WORLD if process_group is None else process_group
        if group is None or dist.get_rank(group) < 0:
            raise ValueError(
                f"this process is not in the process group that the {what} are for: pass one that it is in"
            )
        name = str(group.group_name)
        _counts[name] += 1
        store = dist.distributed_c10d.PrefixStore(
            f"trainkit/{name}/{_counts[name]}", dist.distributed_c10d._get_default_store()
        )
        return Placement(group, store, dist.get_rank(group), dist.get_world_size(group))


class Exchange:
    """Messages between all ranks; every rank makes the same calls in the same order.

    Args:
        store: shared by the ranks.
        rank: this one.
        size: how many there are.
        timeout_s: seconds that one message may take.
        heed: called twice a second while waiting; may raise what makes waiting useless.
    """

    def __init__(
        self, store: Store, rank: int, size: int, timeout_s: float, heed: Callable[[], None] = lambda: None
    ) -> None:
        self.rank, self.size = rank, size
        self._store, self._timeout_s, self._heed = store, timeout_s, heed
        self._turn = 0
        self._said: list[str] = []

    def gather(self, said: Any, timeout_s: float | None = None) -> list[Any]:
        """What every rank said, in their order.

        Args:
            said: this rank's part; plain JSON.
            timeout_s: seconds for this call, where that is another time.

        Raises:
            RankMissing: a rank did not say anything in time, or something that is no JSON.
        """
        self._say(said)
        heard = [self._heard(f"say/{self._turn}/{rank}", rank, timeout_s) for rank in range(self.size)]
        if self.rank > 0:
            self._store.set(f"heard/{self._turn}/{self.rank}", "0")
        else:  # the store may go with this process: not before everybody has heard
            for rank in range(1, self.size):
                key = f"heard/{self._turn}/{rank}"
                self._heard(key, rank, timeout_s)
                self._store.delete_key(key)
        # everybody has come this far, so what was said before has been read
        try:
            for key in self._said[:-1]:
                self._store.delete_key(key)
        except RuntimeError:  # torch's DistNetworkError: rank 0 may have left by now, and the store with it
            if self.rank == 0:
                raise
        del self._said[:-1]
        return heard

    def from_first(self, said: Any = None, timeout_s: float | None = None) -> Any:
        """What rank 0 says, on every rank; likewise."""
        if self.rank == 0:
            self._say(said)
            return said
        self._turn += 1
        return self._heard(f"say/{self._turn}/0", 0, timeout_s)

    def _say(self, said: Any) -> None:
        self._turn += 1
        key = f"say/{self._turn}/{self.rank}"
        self._store.set(key, json.dumps(said))
        self._said.append(key)

    def _heard(self, key: str, rank: int, timeout_s: float | None) -> Any:
        longest = self._timeout_s if timeout_s is None else timeout_s
        until = time.monotonic() + longest
        while True:
            try:
                self._store.wait([key], timedelta(seconds=min(max(until - time.monotonic(), 0.01), _LOOK_S)))
                break
            except RuntimeError as error:
                if store_is_gone(error):
                    raise RankMissing(
                        "torch's store is gone, and with it the process that kept it, rank 0's", 0
                    ) from error
                self._heed()
                if time.monotonic() >= until:
                    message = f"rank {rank} did not come within {longest:g} s: is its process alive?"
                    raise RankMissing(message, rank) from error
        try:
            return read_json(self._store.get(key))
        except ValueError as error:
            raise RankMissing(f"rank {rank} said what makes no sense ({error})", rank) from None


def store_is_gone(error: RuntimeError) -> bool:
    """Whether the store's connection has failed; otherwise a wait has ended in vain."""
    from torch.distributed import DistNetworkError

    return isinstance(error, DistNetworkError)


def read_json(text: bytes | str, most_bytes: int = MOST_BYTES) -> Any:
    """JSON from another process.

    Raises:
        ValueError: it is too long, too deep, or none.
    """
    if len(text) > most_bytes:
        raise ValueError(f"a message of {len(text)} bytes, {most_bytes} is the most")
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
