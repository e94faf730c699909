"""What the first rank that saw a failure tells the others, where no connection is left to say it over."""

import json
import threading
from collections.abc import Callable

from trainkit.collectives._exchange import Store, read_json
from trainkit.collectives.execute._errors import ExecutionError, PeerLost

_KEY = "failed"
_MOST_BYTES = 4096
_MOST_WORDS = 500
_STORE_S = 2.0
"""Seconds for the store to answer: it may be on the host that is gone."""


class Verdict:
    """The one failure that all ranks of a runner report.

    Args:
        store: shared by the ranks.
        rank: this one.
    """

    def __init__(self, store: Store, rank: int) -> None:
        self._store, self._rank = store, rank

    def give(self, error: ExecutionError) -> ExecutionError:
        """Write down what this rank saw, unless another one was first; what then counts."""
        culprit = error.rank if isinstance(error, PeerLost) else None
        mine = json.dumps({"words": str(error)[:_MOST_WORDS], "rank": culprit, "seen_by": self._rank})
        told = _in_time(lambda: self._store.compare_set(_KEY, "", mine))
        return error if told is None or told == mine.encode() else _read(told) or error

    def read(self) -> ExecutionError | None:
        """What another rank wrote down; does not wait."""
        try:
            return _read(self._store.get(_KEY)) if self._store.check([_KEY]) else None
        except RuntimeError:
            return None


def _in_time(ask: Callable[[], bytes]) -> bytes | None:
    """The store's answer; None where it is gone or does not answer."""
    answers: list[bytes] = []

    def call() -> None:
        try:
            answers.append(ask())
        except RuntimeError:
            return

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(_STORE_S)
    return answers[0] if answers else None


def _read(told: bytes) -> ExecutionError | None:
    try:
        said = read_json(told, _MOST_BYTES)
        words, culprit, seen_by = str(said["words"])[:_MOST_WORDS], said["rank"], int(said["seen_by"])
        words = "".join(letter if letter.isprintable() else " " for letter in words)
        words = words if ", as rank " in words else f"{words}, as rank {seen_by} saw"
        return ExecutionError(words) if culprit is None else PeerLost(words, int(culprit))
    except (ValueError, KeyError, TypeError):
        return None
