"""Which schedule carries a message: from a network, cut to the message's size, or given."""

from collections.abc import Callable
from typing import Any

from trainkit.collectives._exchange import Exchange, Placement, RankMissing
from trainkit.collectives._topology import Topology
from trainkit.collectives.execute._errors import ExecutionError, PeerLost
from trainkit.collectives.execute._trees import trees_of, trees_said
from trainkit.collectives.schedule import Schedule
from trainkit.collectives.trees import allreduce_forest, forest

_MOST_CHUNKS = 64
_LEAST_CHUNK = {"cpu": 32 << 10, "cuda": 64 << 20}
"""Bytes of a message that cost as much as some ten starts of one: 0.1 ms by TCP, 50 us by NCCL over NVLink."""
_PLANNING_S = 600.0


class Schedules:
    """Schedules of one network for collectives of any size.

    Args:
        topology: the network.
        chunk_bytes: the least that is worth a message of its own; a tree's share is cut into at most 64. None: 32 KiB
            in host memory, 64 MiB on GPUs.
        placement: this process among the ranks; rank 0 hands its trees to the others, so that all have the same.
        timeout_s: seconds that rank 0 may be late, beside the time that it plans for.
        heed: see `Exchange`.
        group: the compute nodes that take part, in rank order; None: all.
    """

    def __init__(
        self,
        topology: Topology,
        chunk_bytes: int | None,
        placement: Placement,
        timeout_s: float,
        heed: Callable[[], None] = lambda: None,
        group: list[str] | None = None,
    ) -> None:
        self.group, self._heed = group, heed
        self.topology, self._chunk_bytes, self._rank = topology, chunk_bytes, placement.rank
        self._placement, self._timeout_s = placement, timeout_s
        self._trees: dict[str, Any] = {}
        self._kept: dict[tuple[str, int], Schedule] = {}
        self.newest: Schedule | None = None
        """What `get` gave last."""

    def get(self, collective: str, nbytes: int, root: int | None = None, device: str = "cpu") -> Schedule:
        """The schedule of "allreduce", "allgather", "reduce_scatter" or "broadcast" (from rank `root` of the schedule).

        Args:
            collective: what to run.
            nbytes: of the whole message.
            root: rank that broadcasts.
            device: type of the device that holds the message.

        Raises:
            ValueError: the network has no trees for it.
            PeerLost: rank 0 did not hand its trees over.
        """
        name = collective if root is None else f"{collective}/{root}"
        if name not in self._trees:
            self._trees[name] = self._made(name, collective, root)
        trees, share = self._trees[name]
        chunks, least = 1, self._chunk_bytes or _LEAST_CHUNK[device]
        while chunks < _MOST_CHUNKS and share * nbytes >= 2 * chunks * least:
            chunks *= 2
        if (name, chunks) not in self._kept:
            self._kept[name, chunks] = trees.schedule(chunks)
        self.newest = self._kept[name, chunks]
        return self.newest

    def _made(self, name: str, collective: str, root: int | None) -> tuple[Any, float]:
        """The trees, and the greatest part of the message that one carries."""
        import torch.distributed as dist

        place = self._placement
        # under the collective's own name: a rank that has called another one waits in vain, and is told so
        store = dist.distributed_c10d.PrefixStore(f"trees/{name}", place.store)  # type: ignore[arg-type]
        exchange = Exchange(store, self._rank, place.size, self._timeout_s + _PLANNING_S, self._heed)
        if self._rank == 0:
            try:
                trees = self._found(collective, root)
            except Exception as error:  # the others must not wait for trees that do not come
                exchange.from_first({"refused": f"rank 0 found no trees for {collective}: {error}"})
                raise
            exchange.from_first(trees_said(trees))
        else:
            try:
                said = exchange.from_first()
            except RankMissing as error:
                raise PeerLost(f"rank 0 did not hand over its trees for {name}: {error}", 0) from error
            if isinstance(said, dict) and "refused" in said:
                raise ValueError(str(said["refused"]))
            try:
                trees = trees_of(said)
            except ValueError as error:
                raise ExecutionError(f"rank 0's trees for {name} make no sense: {error}") from error
        return trees, float(max((trees.reduce if collective == "allreduce" else trees).shares()))

    def _found(self, collective: str, root: int | None) -> Any:
        if collective == "allreduce":
            return allreduce_forest(self.topology, group=self.group)
        if root is None:
            return forest(self.topology, collective, group=self.group)  # type: ignore[arg-type]
        nodes = self.group or self.topology.compute_nodes
        return forest(self.topology, "broadcast", root=nodes[root], group=self.group)
