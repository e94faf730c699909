"""The options of a scheduler, checked once for the native core and its reference."""

from collections.abc import Mapping
from typing import Literal, get_args

from trainkit.serving.scheduler._profile import Profile

DropRule = Literal["window", "timeout", "auto"]
DeferRule = Literal["always", "demand", "never", "auto"]


class SchedulerError(ValueError):
    """A scheduler cannot be made or asked like this."""


def check(profiles: Mapping[str, Profile], gpus: int, drop: str, defer: str, jitter_ns: int) -> None:
    """Refuse what no scheduler could use.

    Raises:
        SchedulerError: with the rule and the value.
    """
    for name, profile in profiles.items():
        if not isinstance(profile, Profile):
            raise SchedulerError(f"profiles are Profile objects by name, got {type(profile).__name__} for {name!r}")
    if not 0 <= gpus <= 1_000_000:
        raise SchedulerError(f"gpus is from 0 to 1000000, got {gpus}")
    if drop not in get_args(DropRule):
        raise SchedulerError(f"drop is one of {', '.join(get_args(DropRule))}, got {drop!r}")
    if defer not in get_args(DeferRule):
        raise SchedulerError(f"defer is one of {', '.join(get_args(DeferRule))}, got {defer!r}")
    if not 0 <= jitter_ns <= 10**12:
        raise SchedulerError(f"jitter_ns is from 0 to 10^12 ns, got {jitter_ns}")
