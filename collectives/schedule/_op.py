"""One movement of one slice: what schedules are made of."""

from fractions import Fraction
from typing import Literal, NamedTuple, get_args

Kind = Literal["send", "reduce", "copy"]
Mode = Literal["steps", "pipelined"]
KINDS = frozenset(get_args(Kind))
Collective = Literal["allgather", "reduce_scatter", "allreduce", "broadcast", "reduce"]


class Op(NamedTuple):
    """One movement of one slice of the buffer.

    Every rank holds a buffer of the whole message M, in place: slice `[start, stop)`, in fractions of M, means the same
    bytes on every rank.
    """

    id: int
    """Place in `Schedule.ops`."""
    kind: Kind
    """send: `dst` stores what `src` holds. reduce: `dst` adds it. copy: within one rank, from `source`."""
    src: int
    """Sending rank."""
    dst: int
    """Receiving rank; equal to `src` for a copy."""
    start: Fraction
    """First byte of the slice, as a fraction of M."""
    stop: Fraction
    """End of the slice, as a fraction of M."""
    path: tuple[str, ...] = ()
    """Physical nodes from sender to receiver, both included; empty for a copy."""
    depends: tuple[int, ...] = ()
    """Ids of the ops that must be complete before this one starts; always smaller than `id`."""
    step: int = 0
    """Mode "steps": the barrier interval that this op runs in. Mode "pipelined": the wave, for reading only."""
    source: Fraction | None = None
    """A copy's first source byte, as a fraction of M."""


class ScheduleError(ValueError):
    """A schedule that does not do what its collective promises."""
