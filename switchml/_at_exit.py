"""Closing what was left open, before the interpreter ends under its threads."""

import atexit
import weakref
from typing import Protocol


class Closable(Protocol):
    """Something with a thread in the native core."""

    def close(self) -> None:
        """End the thread; does nothing the second time."""


_open: "weakref.WeakSet[Closable]" = weakref.WeakSet()


def close_at_exit(one: Closable) -> None:
    """Close `one` when the program ends, unless it is gone by then: a thread must not outlive the interpreter."""
    _open.add(one)


@atexit.register
def _close_all() -> None:
    for one in list(_open):
        one.close()
