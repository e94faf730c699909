"""A session over several channels: independent streams, each with a socket and a thread at both ends."""

import threading
from collections import Counter, deque
from concurrent.futures import Future
from dataclasses import replace
from itertools import pairwise

from trainkit.switchml._buffers import joined_address, parse_address
from trainkit.switchml._errors import SwitchMLError
from trainkit.switchml._fixed_point import Floats
from trainkit.switchml._link import Link
from trainkit.switchml._membership import Membership
from trainkit.switchml._options import Options
from trainkit.switchml._place import Place

_WORTH = 8
"""Chunks for which it pays to wake another channel."""


class Channels:
    """Joins on construction; a long bucket is shared by all channels, short ones take turns. Same face as `Link`.

    Args:
        options: what the user asked for.
        place: this worker's.

    Raises:
        SwitchMLError: the session could not be joined; the subclass tells why.
    """

    def __init__(self, options: Options, place: Place) -> None:
        self._links = [Link(options, place)]
        first = self._links[0]
        host, _ = parse_address(options.switch, "switch")
        try:
            for channel, port in enumerate(first.ports[1:], 1):
                there = replace(options, switch=joined_address(host, port), elements=first.member.elements)
                self._links.append(Link(there, place, channel))
        except BaseException:
            self.close()
            raise
        self._lock = threading.Lock()
        self._next = self._done = self._acknowledged = 0
        # of each bucket that is not acknowledged: the channels that have a part, and how many parts those had before it
        self._parts: deque[list[tuple[Link, int]]] = deque()
        self._submitted = Counter[Link]()

    def submit(
        self, values: Floats, out: Floats, residual: Floats | None = None, index: int | None = None
    ) -> "Future[None]":
        """As `Link.submit`."""
        with self._lock:
            shares = self._share(values.size, index)
            self._prune()
            self._parts.append([(link, self._submitted[link]) for link, _ in shares])
            self._submitted.update(link for link, _ in shares)
            parts = [
                link.submit(values[span], out[span], None if residual is None else residual[span], index)
                for link, span in shares
            ]
        return self._together(parts)

    @property
    def member(self) -> Membership:
        """What the join of the first channel agreed."""
        return self._links[0].member

    @property
    def acknowledged(self) -> int:
        """Buckets that are known to be finished on all workers."""
        with self._lock:
            self._prune()
            return self._acknowledged

    @property
    def error(self) -> SwitchMLError | None:
        """Why the session failed; None while it works."""
        return next((link.error for link in self._links if link.error), None)

    def wait_for(self, timeout_s: float) -> None:
        """Change the time limit."""
        for link in self._links:
            link.options = replace(link.options, timeout_s=timeout_s)

    def counters(self) -> dict[str, int]:
        """What has travelled and what became of it: the names of `COUNTED`."""
        total = sum((Counter(link.counters()) for link in self._links), Counter[str]())
        return {**total, "buckets": self._done}

    def close(self) -> None:
        """Leave the session and end the threads; what was not finished fails."""
        for link in self._links:
            link.close()

    def _prune(self) -> None:
        while self._parts and all(before < link.acknowledged for link, before in self._parts[0]):
            self._parts.popleft()
            self._acknowledged += 1

    def _share(self, size: int, index: int | None) -> list[tuple[Link, slice]]:
        """Which channel takes which part; a function of the buckets so far, and so the same on all ranks."""
        elements, channels = self.member.elements, len(self._links)
        chunks = -(-size // elements)
        if channels == 1 or chunks < _WORTH * channels:
            self._next += index is None
            return [(self._links[(self._next if index is None else index) % channels], slice(0, size))]
        cuts = [*(channel * chunks // channels * elements for channel in range(channels)), size]
        return [(link, slice(*span)) for link, span in zip(self._links, pairwise(cuts), strict=True)]

    def _together(self, parts: list["Future[None]"]) -> "Future[None]":
        done: Future[None] = Future()
        left = len(parts)

        def finished(part: "Future[None]") -> None:
            nonlocal left
            error = part.exception()
            with self._lock:
                left = 0 if error and left > 0 else left - 1  # the first error is the bucket's
                ended = left == 0
                self._done += ended and not error
            # without the lock: who waits may submit the next bucket
            if ended and error:
                done.set_exception(error)
            elif ended:
                done.set_result(None)

        for part in parts:
            part.add_done_callback(finished)
        return done
