"""What a training process holds of its schedules: `ForestState` and its hook."""

from collections import Counter
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from trainkit.collectives._exchange import Placement
from trainkit.collectives._topology import Topology
from trainkit.collectives.execute._ddp import check_group
from trainkit.collectives.execute._errors import ExecutionError
from trainkit.collectives.execute._failover import Failover
from trainkit.collectives.execute._options import ForestOptions, options_of
from trainkit.collectives.execute._runner import Runner
from trainkit.collectives.execute._schedules import Schedules
from trainkit.collectives.schedule import Schedule

TensorFuture = torch.futures.Future[torch.Tensor]


class ForestState:
    """State of `forest_hook`: gradients are summed along a schedule.

    The ranks meet at the first bucket, or by `connect()`. Pickling keeps the arguments and drops the connections. A job
    of one rank has nothing to sum: its buckets stay as they are, whatever the network.

    Args:
        schedule: an all-reduce; it runs as it is, whatever a bucket's size.
        topology: the network; the best all-reduce along trees is found for it, and cut to each bucket's size.
        process_group: the ranks, those of the DDP model; None is the default group.
        options: see `ForestOptions`.
        **settings: single options, such as `timeout_s=60`.

    Raises:
        ValueError: both or neither of `schedule` and `topology`, a schedule of another collective, or an argument
            outside its range.
        ScheduleError: the schedule is wrong.
        TypeError: there is no such option.

    Example:
        >>> state = ForestState(topology=Topology.load("network.json"))
        >>> ddp.register_comm_hook(state, forest_hook)
    """

    def __init__(
        self,
        schedule: Schedule | None = None,
        topology: Topology | None = None,
        *,
        process_group: "dist.ProcessGroup | None" = None,
        options: ForestOptions | None = None,
        **settings: Any,
    ) -> None:
        if (schedule is None) == (topology is None):
            raise ValueError("give either the schedule to run or the topology to find one for")
        if schedule is not None:
            if schedule.collective != "allreduce":
                raise ValueError(f"gradients need an allreduce schedule, got {schedule.collective}")
            schedule.verify()
        self.schedule, self.topology, self.process_group = schedule, topology, process_group
        self.options = options_of(ForestOptions, options, settings, "ForestState")
        self._past: Counter[str] = Counter()
        self._reset()

    def _reset(self) -> None:
        self.runner: Runner | None = None
        self.error: ExecutionError | None = None
        self._schedules: Schedules | None = None
        self._failover: Failover | None = None
        self._alone = False
        self.checked = False

    def __getstate__(self) -> dict[str, Any]:
        dropped = ("runner", "error", "_schedules", "_failover", "process_group")
        return {key: value for key, value in self.__dict__.items() if key not in dropped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, process_group=None)
        self._reset()

    def connect(self) -> None:
        """Meet the other ranks, unless that is done; all do so at the same time.

        Raises:
            ValueError: torch.distributed is not initialised, or this process is not in the group.
            PeerLost: a rank did not come.
        """
        if self.runner is not None or self._alone:
            return
        placement = Placement.of(self.process_group, "schedules")
        if placement.size == 1:
            self._alone = True
            return
        self.runner = Runner(placement, options=self.options, overlap=self.options.fallback == "error")
        if self.topology is not None:
            timeout_s = self.options.patience_s
            self._schedules = Schedules(self.topology, self.options.chunk_bytes, placement, timeout_s, self.runner.heed)
        if self.options.fallback == "allreduce":
            self._failover = Failover(self.runner)

    @property
    def ran(self) -> Schedule | None:
        """The schedule of the newest bucket; None before there is one."""
        return self.schedule or (self._schedules.newest if self._schedules is not None else None)

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
            A future of `tensor`; it always ends, with an `ExecutionError` at the latest after the time-out.
        """
        self.connect()
        future = TensorFuture(devices=[tensor.device] if tensor.is_cuda else None)
        runner = self.runner
        if runner is None:
            future.set_result(tensor)
            return future
        if average:
            tensor.div_(runner.placement.size)
        failover = self._failover
        try:
            if failover is None or tensor.is_cuda:
                schedule = self.schedule_for(tensor.nbytes, tensor.device.type)
                done = runner.submit(schedule, tensor, "average" if average else "sum")
            else:
                ready = self._prepared(runner, tensor)
                done = runner.later(lambda: failover.all_reduce(ready, tensor))
        except ExecutionError as error:
            self.error = self.error or error
            raise

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

    def _prepared(self, runner: Runner, tensor: torch.Tensor) -> Schedule | None:
        """The schedule, its ranks connected; None where they can no longer be, which the fallback is for."""
        if runner.failure is None:
            with suppress(ExecutionError):
                schedule = self.schedule_for(tensor.nbytes, tensor.device.type)
                runner.prepare(schedule, tensor.device)
                return schedule
        return None

    def counters(self) -> dict[str, int]:
        """Bytes that were sent and received so far, in closed connections too."""
        return dict(self._past + Counter(self.runner.counters() if self.runner else {}))

    def close(self) -> None:
        """Let the connections go; the next bucket would make them anew."""
        if self._failover is not None:
            self._failover.close()
        if self.runner is not None:
            self._past += Counter(self.runner.counters())
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
    if not state.checked:
        check_group(bucket, state.process_group, "ForestState")
        state.checked = True
    return state.all_reduce(bucket.buffer(), average=True)
