"""What a training process holds of its schedules: `ForestState` and its hook."""

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, Literal

import torch
import torch.distributed as dist

from trainkit.collectives._topology import Topology
from trainkit.collectives.execute._errors import ExecutionError
from trainkit.collectives.execute._rescue import Rescue
from trainkit.collectives.execute._runner import Runner, Way, check_options
from trainkit.collectives.execute._schedules import Schedules
from trainkit.collectives.schedule import Schedule

TensorFuture = torch.futures.Future[torch.Tensor]


class ForestState:
    """State of `forest_hook`: gradients are summed along a schedule.

    The ranks meet at the first bucket, or by `connect()`. Pickling keeps the arguments and drops the connections.

    Args:
        schedule: an all-reduce; it runs as it is, whatever a bucket's size.
        topology: the network; the best all-reduce along trees is found for it, and cut to each bucket's size.
        ranks: compute node -> rank; None takes the order of the compute nodes.
        process_group: the ranks; None is the default group.
        deadline_s: seconds without progress after which a bucket fails with a named error on every rank.
        fallback: "allreduce" goes on with the process group's all-reduce when the schedule's connections fail (buckets
            in host memory); "error" raises.
        transport: see `Runner`.
        interface: see `Runner`.
        chunk_bytes: with `topology`: the least that is worth a message of its own; None: 32 KiB in host memory, 64 MiB
            on GPUs, where a message takes longer to start than to send.

    Raises:
        ValueError: both or neither of `schedule` and `topology`, a schedule of another collective, or an argument
            outside its range.
        ScheduleError: the schedule is wrong.

    Example:
        >>> state = ForestState(topology=Topology.load("network.json"))
        >>> ddp.register_comm_hook(state, forest_hook)
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        topology: Topology | None = None,
        *,
        ranks: Mapping[str, int] | None = None,
        process_group: "dist.ProcessGroup | None" = None,
        deadline_s: float = 30.0,
        fallback: Literal["error", "allreduce"] = "error",
        transport: Way = "auto",
        interface: str | None = None,
        chunk_bytes: int | None = None,
    ) -> None:
        if (schedule is None) == (topology is None):
            raise ValueError("give either the schedule to run or the topology to find one for")
        if schedule is not None:
            if schedule.collective != "allreduce":
                raise ValueError(f"gradients need an allreduce schedule, got {schedule.collective}")
            schedule.verify()
        if fallback not in ("error", "allreduce"):
            raise ValueError(f'fallback must be "error" or "allreduce", got {fallback!r}')
        if chunk_bytes is not None and chunk_bytes < 1:
            raise ValueError(f"chunk_bytes must be at least 1, got {chunk_bytes}")
        check_options(deadline_s, transport)
        self.schedule, self.topology, self.fallback = schedule, topology, fallback
        self._chunk_bytes, self._group = chunk_bytes, process_group
        self._options: dict[str, Any] = {
            "ranks": ranks,
            "deadline_s": deadline_s,
            "transport": transport,
            "interface": interface,
        }
        self._reset()

    def _reset(self) -> None:
        self.runner: Runner | None = None
        self.error: ExecutionError | None = None
        self._schedules: Schedules | None = None
        self._rescue: Rescue | None = None

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("runner", "error", "_schedules", "_rescue", "_group")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _group=None)
        self._reset()

    def connect(self) -> Runner:
        """Make the runner, unless that is done; all ranks do so at the same time.

        Raises:
            ValueError: torch.distributed is not initialised, or this process is not in the group.
        """
        if self.runner is None:
            self.runner = Runner(self._group, overlap=self.fallback == "error", **self._options)
            seat = self.runner.seat
            if self.topology is not None:
                self._schedules = Schedules(self.topology, self._chunk_bytes, seat.store, seat.rank)
            if self.fallback == "allreduce":
                self._rescue = Rescue(self.runner, self._options["deadline_s"])
        return self.runner

    def schedule_for(self, nbytes: int, device: str = "cpu") -> Schedule:
        """The schedule that a bucket of `nbytes` runs on, in the memory of that type of device."""
        self.connect()
        if self._schedules is not None:
            return self._schedules.get("allreduce", nbytes, device=device)
        assert self.schedule is not None
        return self.schedule

    def all_reduce(self, tensor: torch.Tensor, *, average: bool = False) -> TensorFuture:
        """Sum `tensor` over the ranks, in place; all ranks end with the same bits.

        Args:
            tensor: contiguous; on all ranks of one size and dtype, and in the same order of calls.
            average: divide by the number of ranks (before summing, as DDP does).

        Returns:
            A future of `tensor`; it always ends, with an `ExecutionError` at the latest after the deadline.
        """
        runner = self.connect()
        schedule = self.schedule_for(tensor.nbytes, tensor.device.type)
        if average:
            tensor.div_(runner.seat.size)
        rescue = self._rescue
        if rescue is None or tensor.is_cuda:
            done = runner.submit(schedule, tensor)
        else:
            runner.prepare(schedule, tensor.device)
            done = runner.later(lambda: rescue.all_reduce(schedule, tensor))
        future = TensorFuture(devices=[tensor.device] if tensor.is_cuda else None)

        def finish(done: "Future[None]") -> None:
            error = done.exception()
            if error is None:
                future.set_result(tensor)
                return
            if isinstance(error, ExecutionError):
                self.error = self.error or error
            future.set_exception(error)  # type: ignore[arg-type]

        with runner.behind(tensor.device):  # the backward pass goes on meanwhile
            done.add_done_callback(finish)
        # through then(), the error's own words survive the way through C++
        return future.then(lambda finished: finished.value())

    def counters(self) -> dict[str, int]:
        """Bytes that were sent and received so far."""
        return self.runner.counters() if self.runner else {}

    def close(self) -> None:
        """Let the connections go; the next bucket would make them anew."""
        if self._rescue is not None:
            self._rescue.close()
        if self.runner is not None:
            self.runner.close()
        self._reset()


def forest_hook(
    state: ForestState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> TensorFuture:
    """Average a bucket's gradients along the state's schedule.

    Up to the order of the sums the result is the same as with no hook; it is the same bits on all ranks and in every
    run.

    Args:
        state: the schedule and its connections.
        bucket: gradients of any floating-point dtype.

    Example:
        >>> ddp.register_comm_hook(ForestState(topology=network), forest_hook)
    """
    return state.all_reduce(bucket.buffer(), average=True)
