"""A data fetcher that can look ahead: a search's batches are fetched early, trained on later, none lost or doubled."""

import copy
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from lightning_fabric.utilities.data import _set_sampler_epoch


@dataclass(frozen=True)
class Item:
    """A fetched batch.

    Attributes:
        batch: as the loader gave it.
        last: whether its epoch ends with it.
        states: the stateful loaders' states after it.
    """

    batch: Any
    last: bool
    states: list[dict[str, Any]]


class Lookahead:
    """Stands in for the fit loop's data fetcher and adds `peek`.

    Args:
        inner: the fetcher that Lightning chose.
        epoch: returns the current epoch's number, for samplers of epochs that are entered early.

    Raises:
        ValueError: the module takes the loader's iterator itself.
    """

    def __init__(self, inner: Any, epoch: Callable[[], int]) -> None:
        if type(inner).__name__ == "_DataLoaderIterDataFetcher":
            raise ValueError(
                "AutoLRS gives every trial the same batches, but this module's training_step takes a dataloader_iter: "
                "take `batch` instead"
            )
        self.inner, self._epoch = inner, epoch
        self._ahead: deque[Item | None] = deque()  # None: an epoch's border
        self._consumed: list[dict[str, Any]] | None = None

    def peek(self, count: int) -> list[Item]:
        """The next `count` batches, across epochs, without consuming them."""
        found = [item for item in self._ahead if item is not None]
        borders = sum(item is None for item in self._ahead)
        while len(found) < count:
            if self.inner.done:
                borders += 1
                for loader in self.inner.combined_loader.flattened:
                    _set_sampler_epoch(loader, self._epoch() + borders)
                iter(self.inner)
                if self.inner.done:
                    raise RuntimeError("the training loader gave no batch: give it data")
                self._ahead.append(None)
            if not self._ahead:
                self._consumed = self._live_states()
            batch, _, _ = next(self.inner)
            item = Item(batch, self.inner.done, self._live_states())
            self._ahead.append(item)
            found.append(item)
        return found[:count]

    def states(self) -> list[dict[str, Any]]:
        """The stateful loaders' states after the last batch that the loop consumed."""
        return self._live_states() if self._consumed is None else self._consumed

    def _live_states(self) -> list[dict[str, Any]]:
        return copy.deepcopy(self.inner.combined_loader._state_dicts())

    def __iter__(self) -> "Lookahead":
        if self._ahead and self._ahead[0] is None:
            self._ahead.popleft()  # the new epoch was entered by peek
        else:
            self._ahead.clear()
            self._consumed = None
            iter(self.inner)
        return self

    def __next__(self) -> tuple[Any, int, int]:
        if not self._ahead:
            self._consumed = None
            found: tuple[Any, int, int] = next(self.inner)
            return found
        if self._ahead[0] is None:
            raise StopIteration
        item = self._ahead.popleft()
        assert item is not None
        self._consumed = item.states if self._ahead else None
        return item.batch, 0, 0

    @property
    def done(self) -> bool:
        """Whether the epoch has no batch left."""
        return bool(self.inner.done) if not self._ahead else self._ahead[0] is None

    @property
    def fetched(self) -> int:
        """Lightning counts a resumed epoch's batches here."""
        return int(self.inner.fetched)

    @fetched.setter
    def fetched(self, value: int) -> None:
        self.inner.fetched = value

    def teardown(self) -> None:
        """Ends the loaders' workers."""
        self._ahead.clear()
        self.inner.teardown()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        # The loop hands its profiler's callbacks to the fetcher.
        if name in ("_start_profiler", "_stop_profiler"):
            setattr(self.inner, name, value)
        else:
            super().__setattr__(name, value)


def all_batches(loader: Any, count: int) -> Iterator[Any]:
    """The first `count` batches of a loader, fewer if it has fewer."""
    for index, batch in enumerate(loader):
        if index >= count:
            return
        yield batch
