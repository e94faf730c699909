"""An endless stream of a loader's batches that can look ahead and say where it is."""

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any


class Stream:
    """Batches of a loader, epoch after epoch.

    Args:
        loader: any re-iterable of batches; one with `state_dict` and `load_state_dict` can be resumed mid-epoch. Its
            sampler's (or its own) `set_epoch` is called before each epoch.

    Raises:
        ValueError: the loader gives no batch.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self._loader = loader
        self._ahead: deque[tuple[Any, Any]] = deque()
        self._epoch = 0
        self._iterator: Iterator[Any] | None = None
        self._consumed = self._state()

    def __next__(self) -> Any:
        batch, self._consumed = self._ahead.popleft() if self._ahead else self._fetch()
        return batch

    def peek(self, count: int) -> list[Any]:
        """The next `count` batches, which stay in the stream."""
        while len(self._ahead) < count:
            self._ahead.append(self._fetch())
        return [batch for batch, _ in self._ahead][:count]

    def state_dict(self) -> dict[str, Any]:
        """The position after the last batch that was taken (not merely looked at)."""
        return {"epoch": self._consumed[0], "loader": self._consumed[1]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position; a loader without state starts its epoch again."""
        self._ahead.clear()
        self._epoch, self._iterator = int(state["epoch"]), None
        if state["loader"] is not None and hasattr(self._loader, "load_state_dict"):
            self._loader.load_state_dict(state["loader"])
        self._consumed = (self._epoch, state["loader"])

    def _state(self) -> tuple[int, Any]:
        try:
            held = self._loader.state_dict() if hasattr(self._loader, "state_dict") else None
        except AttributeError:  # a wrapper (accelerate's) around a loader that has none
            held = None
        return self._epoch, copy.deepcopy(held)

    def _fetch(self) -> tuple[Any, Any]:
        for _ in range(2):
            if self._iterator is None:
                for target in (self._loader, getattr(self._loader, "sampler", None)):
                    if target is not None and hasattr(target, "set_epoch"):
                        target.set_epoch(self._epoch)
                self._iterator = iter(self._loader)
            try:
                return next(self._iterator), self._state()
            except StopIteration:
                self._iterator = None
                self._epoch += 1
        raise ValueError(
            f"the loader must give at least one batch an epoch, but {type(self._loader).__name__} gave none: give a loader "
            "that can be iterated again, not a generator"
        )
