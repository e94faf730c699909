"""Which schedule carries a message: from a network, cut to the message's size, or given."""

import pickle
from datetime import timedelta
from typing import Any

from trainkit.collectives._topology import Topology
from trainkit.collectives.execute._errors import PeerLost
from trainkit.collectives.execute._mesh import Store
from trainkit.collectives.schedule import Schedule
from trainkit.collectives.trees import allreduce_forest, forest

_MOST_CHUNKS = 64
_LEAST_CHUNK = {"cpu": 32 << 10, "cuda": 64 << 20}
"""Bytes of a message that cost as much as some ten starts of one: 0.1 ms by TCP, 50 us by NCCL over NVLink."""
_PLANNING = timedelta(seconds=600)


class Schedules:
    """Schedules of one network for collectives of any size.

    Args:
        topology: the network.
        chunk_bytes: the least that is worth a message of its own; a tree's share is cut into at most 64. None: 32 KiB
            in host memory, 64 MiB on GPUs.
        store: through which rank 0 hands its trees to the others, so that all have the same.
        rank: this one.
        group: the compute nodes that take part, in rank order; None: all.
    """

    def __init__(
        self, topology: Topology, chunk_bytes: int | None, store: Store, rank: int, group: list[str] | None = None
    ) -> None:
        self.group = group
        self.topology, self._chunk_bytes, self._store, self._rank = topology, chunk_bytes, store, rank
        self._trees: dict[str, Any] = {}
        self._kept: dict[tuple[str, int], Schedule] = {}

    def get(self, collective: str, nbytes: int, root: int | None = None, device: str = "cpu") -> Schedule:
        """The schedule of "allreduce", "allgather", "reduce_scatter" or "broadcast" (from rank `root` of the schedule).

        Args:
            collective: what to run.
            nbytes: of the whole message.
            root: rank that broadcasts.
            device: type of the device that holds the message.
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
        return self._kept[name, chunks]

    def _made(self, name: str, collective: str, root: int | None) -> tuple[Any, float]:
        """The trees, and the greatest part of the message that one carries."""
        key = f"trees/{name}"
        if self._rank == 0:
            try:
                trees = self._found(collective, root)
            except Exception as error:  # the others must not wait for trees that do not come
                self._store.set(key, pickle.dumps(f"rank 0 found no trees for {collective}: {error}"))  # type: ignore[arg-type]
                raise
            self._store.set(key, pickle.dumps(trees))  # type: ignore[arg-type]
        else:
            try:
                self._store.wait([key], _PLANNING)
            except RuntimeError as error:
                raise PeerLost(
                    f"rank 0 did not hand over its trees within {_PLANNING}: is its process alive?", 0
                ) from error
            trees = pickle.loads(self._store.get(key))  # written by rank 0 of this job
            if isinstance(trees, str):
                raise ValueError(trees)
        return trees, float(max((trees.reduce if collective == "allreduce" else trees).shares()))

    def _found(self, collective: str, root: int | None) -> Any:
        if collective == "allreduce":
            return allreduce_forest(self.topology, group=self.group)
        if root is None:
            return forest(self.topology, collective, group=self.group)  # type: ignore[arg-type]
        nodes = self.group or self.topology.compute_nodes
        return forest(self.topology, "broadcast", root=nodes[root], group=self.group)
