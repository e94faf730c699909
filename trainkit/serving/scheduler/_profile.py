"""How long a batch of each size takes: a measured table, never extrapolated."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

_FORMAT = "trainkit-profile-1"
# A batch that takes longer than ten days is a mistake, and its sums could wrap.
_LONGEST_NS = 10**15


class ProfileError(ValueError):
    """A profile that cannot be used."""


@dataclass(frozen=True)
class Profile:
    """Latency of a batch by its size.

    Args:
        latency_ns: nanoseconds of a batch of 1, 2, ... requests; positive, never falling.
        about: where and how it was measured (machine, model, runs); free text by key.

    Raises:
        ProfileError: the table is empty, not whole nanoseconds, not positive, or falls.
    """

    latency_ns: tuple[int, ...]
    about: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __init__(self, latency_ns: Sequence[int], about: Mapping[str, Any] | None = None) -> None:
        table = tuple(latency_ns)
        object.__setattr__(self, "latency_ns", table)
        object.__setattr__(self, "about", dict(about or {}))
        if not table:
            raise ProfileError("a profile needs the latency of at least a batch of 1, got none")
        for size, latency in enumerate(table, 1):
            if isinstance(latency, bool) or not isinstance(latency, int) or not 0 < latency <= _LONGEST_NS:
                raise ProfileError(
                    f"a latency is whole nanoseconds from 1 to 10^15, got {latency!r} for a batch of {size}"
                )
        for size, (smaller, larger) in enumerate(pairwise(table), 2):
            if larger < smaller:
                raise ProfileError(
                    f"latency must not fall as the batch grows: {larger} ns for {size}, {smaller} ns for {size - 1}; "
                    "measure with more repetitions, or Profile.monotone"
                )

    @property
    def max_batch(self) -> int:
        """Largest batch that is ever formed."""
        return len(self.latency_ns)

    @staticmethod
    def linear(alpha_ms: float, beta_ms: float, max_batch: int) -> "Profile":
        """The table of l(b) = alpha b + beta, in milliseconds."""
        if max_batch < 1:
            raise ProfileError(f"the largest batch is at least 1, got {max_batch}")
        return Profile([round((alpha_ms * size + beta_ms) * 1e6) for size in range(1, max_batch + 1)])

    @staticmethod
    def monotone(latency_ns: Sequence[int], about: Mapping[str, Any] | None = None) -> "Profile":
        """A measured table with its dips filled: each size takes at least as long as the smaller ones."""
        table: list[int] = []
        for latency in latency_ns:
            table.append(max(latency, table[-1] if table else latency))
        return Profile(table, about)

    @staticmethod
    def slowest(profiles: Sequence["Profile"]) -> "Profile":
        """One table that holds on all of several kinds of GPU."""
        if not profiles:
            raise ProfileError("the slowest of no profiles is not defined")
        return Profile([max(column) for column in zip(*(p.latency_ns for p in profiles), strict=False)])

    def save(self, path: Path | str) -> None:
        """Write it as JSON."""
        from trainkit._files import write_text_atomically

        data = {"format": _FORMAT, "latency_ns": list(self.latency_ns), "about": dict(self.about)}
        write_text_atomically(Path(path), json.dumps(data, indent=1) + "\n")

    @staticmethod
    def load(path: Path | str) -> "Profile":
        """Read what `save` wrote.

        Raises:
            OSError: it cannot be read.
            ProfileError: it is not a profile.
        """
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:
            raise ProfileError(f"{path} is not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            raise ProfileError(
                f"{path} is not a profile: the key format must be {_FORMAT!r}; trainkit serve profile writes one"
            )
        table, about = data.get("latency_ns"), data.get("about", {})
        if not isinstance(table, list) or not isinstance(about, dict):
            raise ProfileError(f"{path} must hold latency_ns, a list of whole nanoseconds, and about, an object")
        try:
            return Profile(table, about)
        except ProfileError as error:
            raise ProfileError(f"{path}: {error}") from None
