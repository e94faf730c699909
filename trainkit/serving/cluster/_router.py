"""Ray Serve's request router, told by the scheduler which replica a batch is for."""

from typing import Any

from trainkit.serving.cluster import _membership

try:
    from ray.serve.request_router import RequestRouter
except ModuleNotFoundError:  # without the extra the module can be looked at, not used
    RequestRouter = object


class Pinned(RequestRouter):  # type: ignore[misc]
    """A call goes to the replica that its first argument names; to any where that is None."""

    def update_replicas(self, replicas: list[Any]) -> None:
        """Replicas came or went."""
        super().update_replicas(replicas)
        self._tell()

    def on_replica_actor_died(self, replica_id: Any) -> None:
        """The router noticed a death before Ray Serve's controller did."""
        super().on_replica_actor_died(replica_id)
        self._tell()

    def _tell(self) -> None:
        _membership.tell([replica_id.unique_id for replica_id in self.curr_replicas])

    async def choose_replicas(self, candidate_replicas: list[Any], pending_request: Any = None) -> list[list[Any]]:
        """The one replica."""
        wanted = pending_request.args[0] if pending_request is not None and pending_request.args else None
        chosen = [r for r in self.curr_replicas.values() if wanted is None or r.replica_id.unique_id == wanted]
        return [chosen] if chosen else []
