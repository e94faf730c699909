"""Which worker replicas there are, from Ray Serve's router to the ingress of the same process.

Ray pickles the router's class by value, module variables included: what both sides share lies here, not beside it.
"""

from collections.abc import Callable

_known: list[str] = []
_listeners: list[Callable[[list[str]], None]] = []


def tell(names: list[str]) -> None:
    """The router's side, called in a thread of its own, also before anybody listens."""
    _known[:] = names
    for listener in _listeners:
        listener(names)


def listen(listener: Callable[[list[str]], None]) -> None:
    """Be told which replicas there are, now and whenever that changes."""
    _listeners.append(listener)
    listener(list(_known))
