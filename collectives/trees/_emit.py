"""Forests as schedules."""

from bisect import bisect_right
from collections.abc import Iterable
from fractions import Fraction
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

from trainkit.collectives._topology import Topology, capacities
from trainkit.collectives.schedule import Op, Schedule

if TYPE_CHECKING:
    from trainkit.collectives.trees._allreduce import AllreduceForest
    from trainkit.collectives.trees._flat import Flat
    from trainkit.collectives.trees._forest import Forest


class Hop(NamedTuple):
    """One edge of one tree for one piece, before it has a number."""

    wave: int
    tree: int
    edge: int
    kind: str
    path: tuple[str, ...]
    start: Fraction
    stop: Fraction
    depends: tuple[int, ...]
    """Places of earlier hops in the list they were made in."""


def emit_forest(forest: "Forest", chunks: int) -> Schedule:
    """See `Forest.schedule`."""
    check_chunks(chunks)
    hops: list[Hop] = []
    for tree, (start, stop) in enumerate(tree_slices(forest)):
        size = (stop - start) / chunks
        for chunk in range(chunks):
            piece = (start + chunk * size, start + (chunk + 1) * size)
            tree_hops(hops, forest.flat, forest.topology.nodes, tree, piece, chunk, forest.reducing)
    shards = shard_slices(forest)
    rooted = forest.collective in ("broadcast", "reduce")
    return assemble(
        f"forest of {forest.topology.name}",
        forest.collective,
        forest.members,
        hops,
        forest.topology,
        shards=() if rooted else shards,
        root=next(r for r, (a, b) in enumerate(shards) if a < b) if rooted else None,
    )


def emit_allreduce(forest: "AllreduceForest", chunks: int) -> Schedule:
    """Every piece of a root's shard is reduced up one tree, then broadcast down another."""
    check_chunks(chunks)
    hops: list[Hop] = []
    down_slices = sorted((piece, tree) for tree, piece in enumerate(tree_slices(forest.broadcast)))
    starts = [piece[0] for piece, _ in down_slices]
    for up, (start, stop) in enumerate(tree_slices(forest.reduce)):
        height = int(forest.reduce.flat.heights[up])
        place = bisect_right(starts, start) - 1
        # The two phases cut a shard differently. Each part that one tree reduces and one broadcasts is cut into chunks
        # of its own, so that all trees are busy all the time, each with its share of the links.
        while place < len(down_slices) and down_slices[place][0][0] < stop:
            (below, above), down = down_slices[place]
            first, size = max(start, below), (min(stop, above) - max(start, below)) / chunks
            for chunk in range(chunks):
                piece = (first + chunk * size, first + (chunk + 1) * size)
                arrived = tree_hops(hops, forest.reduce.flat, forest.topology.nodes, up, piece, chunk, True)
                tree_hops(
                    hops, forest.broadcast.flat, forest.topology.nodes, down, piece, chunk + height, False, arrived
                )
            place += 1
    return assemble(
        f"all-reduce forest of {forest.topology.name}", "allreduce", forest.reduce.members, hops, forest.topology
    )


def tree_hops(
    hops: list[Hop],
    flat: "Flat",
    nodes: "Iterable[str]",
    tree: int,
    piece: tuple[Fraction, Fraction],
    wave: int,
    reducing: bool,
    arrived: tuple[int, ...] = (),
) -> tuple[int, ...]:
    """Append one piece's way along one tree; the hops that bring it to the root, reducing."""
    name = list(nodes)
    edges = range(int(flat.edge_start[tree]), int(flat.edge_start[tree + 1]))
    height = int(flat.heights[tree])
    into: dict[int, list[int]] = {}  # vertex -> hops that brought the piece there
    root = int(flat.root[tree])
    if not reducing:
        into[root] = list(arrived)
    for e in reversed(edges) if reducing else edges:
        path = tuple(name[v] for v in flat.path[flat.path_start[e] : flat.path_start[e + 1]])
        tail, head, depth = int(flat.edge_tail[e]), int(flat.edge_head[e]), int(flat.depth[e])
        sender, receiver = (head, tail) if reducing else (tail, head)
        at = wave + (height - depth if reducing else depth - 1)
        into.setdefault(receiver, []).append(len(hops))
        kind = "reduce" if reducing else "send"
        depends = tuple(into.get(sender, ()))
        hops.append(Hop(at, tree, e, kind, path[::-1] if reducing else path, *piece, depends))
    return tuple(into.get(root, ()))


def assemble(
    name: str,
    collective: str,
    members: tuple[str, ...],
    hops: list[Hop],
    topology: Topology,
    shards: "Iterable[tuple[Fraction, Fraction]]" = (),
    root: int | None = None,
) -> Schedule:
    """Number the hops wave by wave: that order is common to all ranks, keeps links busy and cannot deadlock."""
    rank = {member: number for number, member in enumerate(members)}
    order = sorted(range(len(hops)), key=lambda at: hops[at].wave)
    number = {at: op_id for op_id, at in enumerate(order)}
    ops = []
    for op_id, at in enumerate(order):
        hop = hops[at]
        depends = tuple(sorted(number[other] for other in hop.depends))
        source, target = rank[hop.path[0]], rank[hop.path[-1]]
        ops.append(Op(op_id, hop.kind, source, target, hop.start, hop.stop, hop.path, depends, hop.wave))  # type: ignore[arg-type]
    return Schedule(
        name=name,
        collective=collective,  # type: ignore[arg-type]
        ranks=members,
        ops=ops,
        mode="pipelined",
        shards=tuple(shards),
        links=capacities(topology),
        unit=topology.unit,
        latency=topology.latency,
        root=root,
        combining=topology.multicast | topology.aggregate,
    )


def shard_slices(forest: "Forest") -> list[tuple[Fraction, Fraction]]:
    """Member -> its slice of the message."""
    weights = [int(forest.weight[forest.topology.index[name]]) for name in forest.members]
    ends = [0, *accumulate(weights)]
    return [(Fraction(a, ends[-1]), Fraction(b, ends[-1])) for a, b in pairwise(ends)]


def tree_slices(forest: "Forest") -> list[tuple[Fraction, Fraction]]:
    """Tree -> its slice of the message: a root's trees divide its shard by their multiplicities."""
    begin = {
        forest.topology.index[name]: piece[0] for name, piece in zip(forest.members, shard_slices(forest), strict=True)
    }
    slices = []
    for root, share in zip(forest.flat.root.tolist(), forest.shares(), strict=True):
        slices.append((begin[root], begin[root] + share))
        begin[root] += share
    return slices


def check_chunks(chunks: int) -> None:
    """Refuse a number of pieces that is none."""
    if isinstance(chunks, bool) or not isinstance(chunks, int) or chunks < 1:
        raise ValueError(f"chunks must be a whole number >= 1, got {chunks!r}")
