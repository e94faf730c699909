"""The one form of every communication schedule: forests, breadth-first broadcasts and rings alike."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from trainkit.collectives.schedule._op import KINDS, Collective, Kind, Mode, Op
from trainkit.collectives.schedule._units import check_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Schedule:
    """A collective as data: who sends which slice to whom, over which links, after what.

    Describe, verify, emit: build it, call `verify()`, then run or export it. Capacities are in the network's own
    unit; only `time` converts and so needs `unit`.

    Example:
        >>> from fractions import Fraction as F
        >>> half = F(1, 2)
        >>> swap = Schedule("swap", "allgather", ("a", "b"), [
        ...     Op(0, "send", 0, 1, F(0), half, ("a", "b")), Op(1, "send", 1, 0, half, F(1), ("b", "a"))],
        ...     "steps", shards=[(F(0), half), (half, F(1))], links={("a", "b"): 1, ("b", "a"): 1}, unit="GB/s")
        >>> swap.verify()
        >>> swap.time(2 * 10**9)
        Fraction(1, 1)
    """

    name: str
    """What it is, for people."""
    collective: Collective
    """What it promises."""
    ranks: tuple[str, ...]
    """Rank -> compute node."""
    ops: Sequence[Op]
    """All ops; ids count from 0 in this order, which is an order that one thread could run them in."""
    mode: Mode
    """"steps": a barrier between steps, an op sees what its sender held when the step began.
    "pipelined": an op starts as soon as its `depends` are complete."""
    shards: Sequence[tuple[Fraction, Fraction]] = ()
    """Rank -> the slice it owns (allgather and reduce_scatter)."""
    links: Mapping[tuple[str, str], Fraction | int] = field(default_factory=dict)
    """Physical link -> capacity."""
    unit: str | None = None
    """Unit of the capacities, see `Topology`."""
    latency: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Physical link -> seconds; what is left out is 0."""
    root: int | None = None
    """Rank of the root (broadcast and reduce)."""
    order: Sequence[Sequence[int]] = ()
    """Rank -> the ids of the ops it takes part in, in the order it issues them. Left out: as in `ops`."""
    combining: frozenset[str] = frozenset()
    """Switches that copy or add in the network: a slice crosses each link at their sides once."""

    def __post_init__(self) -> None:
        """Fill in the order and refuse what no rank could run."""
        for value, allowed in ((self.collective, Collective), (self.mode, Mode)):
            if value not in get_args(allowed):
                raise ValueError(f"a schedule is one of {', '.join(get_args(allowed))}, got {value!r}")
        check_unit(self.unit)
        if self.collective in ("allgather", "reduce_scatter") and len(self.shards) != len(self.ranks):
            raise ValueError(
                f"{self.collective} needs one shard a rank: {len(self.ranks)} ranks, {len(self.shards)} shards"
            )
        if self.collective in ("broadcast", "reduce") and not 0 <= (-1 if self.root is None else self.root) < len(
            self.ranks
        ):
            raise ValueError(f"{self.collective} needs root, a rank below {len(self.ranks)}, got {self.root}")
        for place, op in enumerate(self.ops):
            self._check_op(place, op)
        if not self.order:
            object.__setattr__(self, "order", self._order_of_ops())

    def _check_op(self, place: int, op: Op) -> None:
        size = len(self.ranks)
        if op.id != place:
            raise ValueError(f"op ids count from 0 in order: op at place {place} has id {op.id}")
        if op.kind not in KINDS:
            raise ValueError(f"op {op.id}: kind must be one of {', '.join(get_args(Kind))}, got {op.kind!r}")
        if not (0 <= op.src < size and 0 <= op.dst < size):
            raise ValueError(f"op {op.id}: ranks must be below {size}, got {op.src} -> {op.dst}")
        # whole numbers: comparing Fractions would take half the time of building a large schedule
        (start, under), (stop, below) = op.start.as_integer_ratio(), op.stop.as_integer_ratio()
        if not (start >= 0 and start * below < stop * under and stop <= below):
            raise ValueError(f"op {op.id}: a slice lies within [0, 1] and is not empty, got [{op.start}, {op.stop})")
        if (op.src == op.dst) != (op.kind == "copy") or (op.source is None) == (op.kind == "copy"):
            raise ValueError(f"op {op.id}: a copy stays on one rank and has a source, and only a copy does, got {op}")
        if op.depends and max(op.depends) >= op.id:
            raise ValueError(f"op {op.id}: depends must name earlier ops, got {op.depends}")

    def _order_of_ops(self) -> list[list[int]]:
        order: list[list[int]] = [[] for _ in self.ranks]
        for op in self.ops:
            order[op.src].append(op.id)
            if op.dst != op.src:
                order[op.dst].append(op.id)
        return order

    @property
    def steps(self) -> int:
        """Number of steps (or waves)."""
        return max((op.step for op in self.ops), default=-1) + 1

    def verify(self) -> None:
        """Replay every chunk on every rank.

        Raises:
            ScheduleError: naming the first op that reads what is not there, loses or counts a contribution twice,
                misses a dependency or a link; the ranks whose order waits for each other; or the first rank and
                slice that ends up wrong.
        """
        from trainkit.collectives.schedule._verify import verify

        verify(self)

    def time(self, nbytes: int | Fraction, alpha: float | Fraction | None = None, *, held: int = 0) -> Fraction:
        """Seconds for a message of `nbytes`.

        Args:
            nbytes: M, the whole message in bytes (what allgather returns, what reduce_scatter takes).
            alpha: seconds of latency per step ("steps") or per op ("pipelined"). None takes the links' latencies.
            held: bytes that a connection takes in beside the slice that is on its way (mode "pipelined").

        Returns:
            Exact seconds under the model of `_time`.

        Raises:
            ValueError: the schedule has no unit, or an op uses a link without a capacity.
        """
        from trainkit.collectives.schedule._time import seconds

        return seconds(self, Fraction(nbytes), alpha, held)

    def save(self, path: str | Path) -> None:
        """Write the versioned JSON; an existing file is replaced only by a whole one."""
        from trainkit.collectives.schedule._store import save

        save(self, path)

    @staticmethod
    def load(path: str | Path) -> "Schedule":
        """Read what `save` wrote."""
        from trainkit.collectives.schedule._store import load

        return load(path)

    def draw(self) -> "Figure":
        """Ranks over steps, an arrow for each op."""
        from trainkit.collectives.schedule._draw import draw

        return draw(self)
