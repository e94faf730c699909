"""A stepped allgather as an array of transfers: how breadth-first broadcast is split, replayed and turned round."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

import numpy as np

from trainkit.collectives._native import direct_transfers
from trainkit.collectives.direct._digraph import Digraph, Ints

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trainkit.collectives.schedule import Schedule
    from trainkit.collectives.schedule._op import Kind

STEP, SENDER, RECEIVER, SOURCE, FIRST, LAST = range(6)


@dataclass(frozen=True)
class Chunking:
    """Into how many chunks a shard is cut, and what that costs."""

    chunks: int
    """Chunks a shard."""
    limits: tuple[int, ...]
    """Step -> the most chunks over a link."""
    loss: Fraction
    """Growth of the bandwidth term over the exact split; 0 where the split is exact."""


def chunking(loads: "Sequence[Fraction]", most: int) -> Chunking:
    """The cheapest split of a shard into at most `most` equal chunks, and the coarsest of those.

    Args:
        loads: step -> load of the busiest link, in shards.
        most: greatest number of chunks.

    Raises:
        ValueError: `most` is not positive.
    """
    if most < 1:
        raise ValueError(f"a shard is at least one chunk, got max_chunks={most}")

    def limits(chunks: int) -> tuple[int, ...]:
        return tuple(-(-load.numerator * chunks // load.denominator) for load in loads)

    best = min(range(1, most + 1), key=lambda chunks: Fraction(sum(limits(chunks)), chunks))
    return Chunking(best, limits(best), Fraction(sum(limits(best)), best) / sum(loads) - 1)


@dataclass(frozen=True, eq=False)
class Transfers:
    """Who sends which chunks to whom in which step of an allgather."""

    graph: Digraph
    """The network."""
    chunks: int
    """Chunks a shard."""
    rows: Ints
    """[transfers, 6]: step, sender, receiver, source of the shard, first chunk, end chunk; ordered by step."""

    @classmethod
    def breadth_first(cls, graph: Digraph, split: Chunking) -> "Transfers":
        """Breadth-first broadcast from all hosts at once, split by integral flows."""
        rows = direct_transfers(graph.nodes, graph.tail, graph.head, split.chunks, list(split.limits))
        return cls.of_rows(graph, split.chunks, rows)

    @classmethod
    def of_rows(cls, graph: Digraph, chunks: int, rows: Ints) -> "Transfers":
        """From rows in any order."""
        return cls(graph, chunks, rows[np.argsort(rows[:, STEP], kind="stable")])

    @property
    def steps(self) -> int:
        """Number of steps."""
        return int(self.rows[:, STEP].max(initial=-1)) + 1

    def loads(self) -> list[Fraction]:
        """Step -> load of the busiest link, in shards.

        Raises:
            ValueError: a transfer has no link.
        """
        n = np.int64(self.graph.nodes)
        links, width = np.unique(self.graph.tail * n + self.graph.head, return_counts=True)
        used = self.rows[:, SENDER] * n + self.rows[:, RECEIVER]
        at = np.minimum(np.searchsorted(links, used), len(links) - 1)
        if not np.array_equal(links[at], used):
            wrong = self.rows[int(np.flatnonzero(links[at] != used)[0])]
            raise ValueError(f"step {wrong[STEP]}: there is no link {wrong[SENDER]} -> {wrong[RECEIVER]}")
        load = np.zeros((self.steps, len(links)), dtype=np.int64)
        np.add.at(load, (self.rows[:, STEP], at), self.rows[:, LAST] - self.rows[:, FIRST])
        # few distinct widths, so the exact maximum is taken width by width
        return [
            max(Fraction(int(row[width == w].max()), int(w) * self.chunks) for w in np.unique(width)) for row in load
        ]

    def t_b(self) -> Fraction:
        """Bandwidth term in units of M/B."""
        return Fraction(self.graph.degree, self.graph.nodes) * sum(self.loads())

    def replay(self) -> None:
        """Move every chunk: each arrives once at each host, sent by a host that held it when the step began.

        Raises:
            ValueError: naming the first transfer or chunk that is wrong.
        """
        n, chunks = self.graph.nodes, self.chunks
        count = self.rows[:, LAST] - self.rows[:, FIRST]
        row = np.repeat(np.arange(len(self.rows)), count)
        within = np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count)
        step, sender, receiver, source, first, _ = self.rows[row].T.astype(np.int64)
        chunk = source * chunks + first + within
        arrivals = np.bincount(receiver * n * chunks + chunk, minlength=n * n * chunks).reshape(n, n, chunks)
        wanted = np.broadcast_to(1 - np.eye(n, dtype=np.int64)[:, :, None], arrivals.shape)
        if not np.array_equal(arrivals, wanted):
            host, shard, part = (int(x) for x in np.argwhere(arrivals != wanted)[0])
            raise ValueError(
                f"host {host} gets chunk {part} of shard {shard} {arrivals[host, shard, part]} times, "
                f"not {wanted[host, shard, part]}"
            )
        held = np.zeros((n, n * chunks), dtype=np.int32)
        held[receiver, chunk] = step + 1
        early = np.flatnonzero(held[sender, chunk] > step)
        if len(early):
            bad = self.rows[row[early[0]]]
            raise ValueError(f"step {bad[STEP]}: host {bad[SENDER]} sends shard {bad[SOURCE]} before it holds it")

    def schedule(
        self,
        name: str,
        ranks: "tuple[str, ...]",
        *,
        reduce_scatter: bool = False,
        bandwidth: "int | Fraction | None" = None,
        unit: "str | None" = None,
    ) -> "Schedule":
        """The portable form.

        Args:
            name: of the schedule.
            ranks: host -> name.
            reduce_scatter: run it backwards over the transposed links, adding where the allgather copies.
            bandwidth: of a host, all its ports together, in `unit`; None gives every link the capacity 1.
            unit: of `bandwidth`.
        """
        from trainkit.collectives.schedule import Op, Schedule

        n, pieces = self.graph.nodes, self.graph.nodes * self.chunks
        cut = [Fraction(at, pieces) for at in range(pieces + 1)]
        kind: Kind = "reduce" if reduce_scatter else "send"
        rows = self.rows.copy()
        if reduce_scatter:
            rows = rows[::-1][:, [STEP, RECEIVER, SENDER, SOURCE, FIRST, LAST]]
            rows[:, STEP] = self.steps - 1 - rows[:, STEP]
        rows[:, FIRST] += rows[:, SOURCE] * self.chunks
        rows[:, LAST] += rows[:, SOURCE] * self.chunks
        capacity = Fraction(1) if bandwidth is None else Fraction(bandwidth) / self.graph.degree
        links: dict[tuple[str, str], Fraction | int] = {}
        network = self.graph.reverse() if reduce_scatter else self.graph
        for u, v in network.pairs():
            if u != v:
                links[ranks[u], ranks[v]] = links.get((ranks[u], ranks[v]), 0) + capacity
        path = {(u, v): (ranks[u], ranks[v]) for u, v in set(network.pairs())}
        with _no_collection():
            columns = (rows[:, column].tolist() for column in (STEP, SENDER, RECEIVER, FIRST, LAST))
            return Schedule(
                name=name,
                collective="reduce_scatter" if reduce_scatter else "allgather",
                ranks=ranks,
                ops=[
                    Op(at, kind, src, dst, cut[first], cut[last], path[src, dst], (), step)
                    for at, (step, src, dst, first, last) in enumerate(zip(*columns, strict=True))
                ],
                mode="steps",
                shards=[(cut[u * self.chunks], cut[(u + 1) * self.chunks]) for u in range(n)],
                links=links,
                unit=unit,
            )


@contextmanager
def _no_collection() -> Iterator[None]:
    """A million new tuples set off the cycle collector again and again, which finds nothing and doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
