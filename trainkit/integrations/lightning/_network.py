"""AutoNetworkStrategy: measure the network, plan, carry the gradients that way, and look whether the plan was right."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist
from lightning_utilities.core.rank_zero import rank_zero_info
from pytorch_lightning.strategies import DDPStrategy, StrategyRegistry

from trainkit._planner import NetworkPlan, Way, plan_network
from trainkit.collectives import ForestState, ProbeError, Topology, forest_hook, probe
from trainkit.collectives._probe import placed, placements
from trainkit.integrations.lightning._stopwatch import Stopwatch
from trainkit.integrations.lightning._strategies import _Hooked
from trainkit.switchml import SwitchMLState, switchml_hook

_SETTLING = 2
"""Steps on the process group's ring before planning: DDP rebuilds its buckets after the first."""
_Tensors = torch.futures.Future[torch.Tensor]


@dataclass(frozen=True)
class Comparison:
    """A plan's prediction beside what happened."""

    way: str
    """The way that was taken."""
    steps: int
    """Training steps that the measurement is the median of."""
    predicted_s: float
    """Seconds of communication in a step, predicted."""
    measured_s: float
    """Measured: the least over the ranks, since an early rank's time includes waiting for a late one."""

    def __str__(self) -> str:
        off = self.measured_s / self.predicted_s - 1
        return (
            f"{self.way}: predicted {self.predicted_s:.4g} s of communication a step, "
            f"measured {self.measured_s:.4g} s over {self.steps} steps ({off:+.0%})"
        )


class NetworkState:
    """The state of `auto_network_hook`: plans once the buckets are known, and watches the network.

    Args:
        network: what to plan for, or its file: one compute node a rank, in the order of the ranks unless the probe wrote
            it, whose hosts are known by their addresses; rank 0's counts. None probes.
        switch: "host:port" of a SwitchML switch to consider, with its node in `network`: `(address, node)`.
        token_file: the switch's secret.
        interface: network interface to use; None takes the one that leads to torchrun's MASTER_ADDR.
        deadline_s: seconds without progress after which a bucket fails.
        fallback: "allreduce" goes on with the process group when a schedule or switch fails.
        window: training steps between two looks at the measured time.
        drift: a window's time that is off the first one's by more than this part, twice running, has the network probed
            and planned anew.
    """

    def __init__(
        self,
        network: str | Path | Topology | None = None,
        *,
        switch: tuple[str, str] | None = None,
        token_file: str | None = None,
        interface: str | None = None,
        deadline_s: float = 30.0,
        fallback: Literal["error", "allreduce"] = "error",
        window: int = 50,
        drift: float = 0.3,
    ) -> None:
        if window < 1:
            raise ValueError(f"window is a number of steps of at least 1, got {window}")
        if not drift > 0:
            raise ValueError(f"drift is a part above 0, such as 0.3, got {drift}")
        if not deadline_s > 0:
            raise ValueError(f"deadline_s must be seconds above 0, got {deadline_s}")
        if fallback not in ("error", "allreduce"):
            raise ValueError(f'fallback must be "error" or "allreduce", got {fallback!r}')
        if switch is not None and (isinstance(switch, str) or len(switch) != 2):
            raise ValueError(f'switch is ("host:port", its node in the network), got {switch!r}')
        self.network = Topology.load(network) if isinstance(network, str | Path) else network
        self.plan: NetworkPlan | None = None
        """The plan in force; None in the first steps."""
        self.comparisons: list[Comparison] = []
        """Prediction and measurement, one a window."""
        self._switch, self._token_file, self._interface = switch, token_file, interface
        self._deadline_s, self._fallback = deadline_s, fallback
        self._window, self._drift = window, drift
        self._carry: Callable[[Any], _Tensors] = partial(_over_group, None)
        self._carrier: ForestState | SwitchMLState | None = None
        self._control: dist.ProcessGroup | None = None
        self._ring: dist.ProcessGroup | None = None
        self._sizes: list[tuple[int, int]] = []
        self._clock = Stopwatch()
        self._step = self._since_plan = self._strikes = 0

    def average(self, bucket: Any) -> _Tensors:
        """Average one gradient bucket the planned way."""
        if bucket.index() == 0:
            self.connect()
            self._next_step()
        buffer = bucket.buffer()
        self._sizes.append((buffer.nbytes, buffer.itemsize))
        stop = self._clock.start(buffer.device)
        future = self._carry(bucket)
        return future.then(lambda done: (stop(), done.value())[1])  # type: ignore[func-returns-value]

    @property
    def error(self) -> Exception | None:
        """What the switch or the executor failed with."""
        return self._carrier.error if self._carrier is not None else None

    def connect(self) -> None:
        """Make the group for our own few words, unless that is done; all ranks do so at the same time.

        Raises:
            ValueError: the network that was given is not one of this job's ranks, or a rank has no such interface.
        """
        if self._control is not None:
            return
        control = dist.new_group(backend="gloo")
        # a file may differ from host to host, and ranks with other networks would wait for each other
        box = [self.network]
        dist.broadcast_object_list(box, src=0, group=control)
        network, world = box[0], dist.get_world_size()
        if network is not None and len(network.compute_nodes) != world:
            raise ValueError(
                f"a network plan needs one compute node a rank: {network.name} has "
                f"{len(network.compute_nodes)}, the job {world} ranks: probe with as many ranks a host as the job has"
            )
        if network is not None:
            network = seated(network, seats(control, self._interface))
        self.network, self._control = network, control

    def close(self) -> None:
        """Leave the switch or the executor; the next bucket would join anew."""
        if self._carrier is not None:
            self._carrier.close()

    def _next_step(self) -> None:
        sizes, self._sizes = self._sizes, []
        if self._step > 0:
            self._clock.end_step()
        self._step += 1
        if self._step == _SETTLING + 1:
            self._replan(sizes, self.network)
        elif len(self._clock.steps) >= self._window:
            self._look_back(sizes)

    def _look_back(self, sizes: Sequence[tuple[int, int]]) -> None:
        measured = torch.tensor(median(self._clock.read()), dtype=torch.float64)
        if self.plan is None:
            return
        dist.all_reduce(measured, dist.ReduceOp.MIN, group=self._control)
        way = self.plan.chosen
        now = Comparison(way.name, self._window, way.step_s, float(measured))
        self.comparisons.append(now)
        self._since_plan += 1
        if self._since_plan == 1:
            self._reference = now.measured_s
            rank_zero_info(f"network plan, {now}")
            return
        drifted = abs(now.measured_s / self._reference - 1) > self._drift
        self._strikes = self._strikes + 1 if drifted else 0
        if self._strikes == 2:
            rank_zero_info(f"the network drifted: {now}, {self._reference:.4g} s before; probing and planning anew")
            # where the probe fails, this is the new normal, not a reason to probe again and again
            self._strikes, self._reference = 0, now.measured_s
            self._replan(sizes, None)

    def _replan(self, sizes: Sequence[tuple[int, int]], network: Topology | None) -> None:
        """Plan for a network and change over to what is chosen; without one, for what a probe finds.

        Args:
            sizes: of each bucket, its bytes and those of one gradient.
            network: None probes.
        """
        try:
            network = network or probe(self._control, interface=self._interface)
        except ProbeError as error:
            # the same on every rank
            rank_zero_info(f"no network plan: {error}; gradients go on as before")
            return
        # One rank plans: a search that ends by the clock could end differently elsewhere.
        box: list[Any] = [self._planned(network, sizes) if dist.get_rank() == 0 else None]
        dist.broadcast_object_list(box, src=0, group=self._control)
        if isinstance(box[0], Exception):
            if self.plan is None:
                raise box[0]
            rank_zero_info(f"no new network plan: {box[0]}; gradients go on as before")
            return
        left = self._carrier.groups if isinstance(self._carrier, SwitchMLState) else []
        left += [self._ring] if self._ring is not None else []
        self.close()
        self.network, self.plan = network, box[0]
        self._destroy(left)
        self._adopt(self.plan.chosen)
        self._since_plan = self._strikes = 0
        self._clock.read()
        _show(self.plan)

    def _planned(self, network: Topology, sizes: Sequence[tuple[int, int]]) -> NetworkPlan | Exception:
        """The plan, or whatever is in its way: the other ranks must not wait for it."""
        buckets, itemsizes = zip(*sizes, strict=True)
        backend: Literal["gloo", "nccl"] = "nccl" if dist.get_backend() == "nccl" else "gloo"
        switch = self._switch[1] if self._switch is not None else None
        if self.plan is not None and switch not in network.nodes:
            switch = None  # a probe finds no switch by its name
        try:
            plan = plan_network(network, buckets, itemsizes=itemsizes, switch=switch, backend=backend)
        except ValueError as error:
            return ValueError(str(error))  # without what may not bear the way to the other ranks
        except Exception as error:
            return RuntimeError(f"{type(error).__name__}: {error}")
        # the others are for the table only; a schedule can be megabytes, and this may be a slow network
        ways = (way if way is plan.chosen else replace(way, schedule=None) for way in plan.ways)
        return replace(plan, ways=tuple(ways))

    def _destroy(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """Let go of the process groups of the way that was left; the same on all ranks."""
        self._ring, self._carrier, self._carry = None, None, partial(_over_group, None)
        if groups:
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()  # it waits for the last step's gradients
            # a rank whose own part is done may still have what another one is to get
            dist.barrier(group=self._control)
        for group in groups:
            dist.destroy_process_group(group)

    def _adopt(self, way: Way) -> None:
        if way.schedule is not None:
            forest = ForestState(
                way.schedule, interface=self._interface, timeout_s=self._deadline_s, fallback=self._fallback
            )
            self._carrier, self._carry = forest, lambda bucket: forest_hook(forest, bucket)
        elif way.name == "switchml":
            assert self._switch is not None
            switch = SwitchMLState(
                self._switch[0],
                token_file=self._token_file,
                interface=self._interface,
                timeout_s=self._deadline_s,
                fallback=self._fallback,
            )
            self._carrier, self._carry = switch, lambda bucket: switchml_hook(switch, bucket)
        elif way.name == "reordered ring":
            assert self.network is not None
            ranks = [self.network.compute_nodes.index(name) for name in way.order or ()]
            self._ring = dist.new_group(ranks, sort_ranks=False)
            self._carry = partial(_over_group, self._ring)
        if self._carrier is not None:
            self._carrier.connect()


def _over_group(group: dist.ProcessGroup | None, bucket: Any) -> _Tensors:
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), group=group, async_op=True)
    done: _Tensors = work.get_future().then(lambda future: future.value()[0])
    return done


def _show(plan: NetworkPlan) -> None:
    if dist.get_rank() == 0:
        from rich.console import Console

        Console(stderr=True).print(plan.table())


def auto_network_hook(
    state: NetworkState,
    bucket: dist.GradBucket,  # type: ignore[name-defined]
) -> torch.futures.Future[torch.Tensor]:
    """Average a bucket the way that the plan says; for `DistributedDataParallel.register_comm_hook`.

    Example:
        >>> ddp.register_comm_hook(NetworkState(Topology.load("network.json")), auto_network_hook)
    """
    return state.average(bucket)


class _AutoNetwork(_Hooked):
    """What AutoNetworkStrategy adds to a DDPStrategy, whichever package that comes from."""

    def __init__(
        self,
        network: str | Path | Topology | None = None,
        *,
        switch: tuple[str, str] | None = None,
        token_file: str | None = None,
        interface: str | None = None,
        deadline_s: float = 30.0,
        fallback: Literal["error", "allreduce"] = "error",
        window: int = 50,
        drift: float = 0.3,
        **ddp: Any,
    ) -> None:
        self.network_state = NetworkState(
            network, switch=switch, token_file=token_file, interface=interface, deadline_s=deadline_s,
            fallback=fallback, window=window, drift=drift,
        )  # fmt: skip
        super().__init__(ddp_comm_state=self.network_state, ddp_comm_hook=auto_network_hook, **ddp)


class AutoNetworkStrategy(_AutoNetwork, DDPStrategy):
    """DDP that finds out how to carry its gradients: `Trainer(strategy=AutoNetworkStrategy())`.

    The first two steps run on the process group's ring. Then the network is probed (or read from `network`), the time
    of every way to all-reduce is predicted for the model's own buckets, and the best is taken: see
    `trainkit._planner`. After 50 steps the prediction is compared with what happened; when the network drifts, it is
    probed and planned anew.

    Args:
        network: file written by `trainkit probe`, or a Topology, with one compute node a rank (of the probe's, a rank
            finds its own by its host's address; otherwise the order is the ranks'); None probes.
        switch: (address, node in the network) of a SwitchML switch to consider.
        token_file: that switch's secret.
        interface: network interface to use; None takes the one that leads to torchrun's MASTER_ADDR.
        deadline_s: seconds without progress after which training ends with a named error.
        fallback: "allreduce" goes on with the process group when a schedule or the switch fails.
        window: training steps between two looks at the time of communication.
        drift: how far, as a part, that time may move before the network counts as changed.
        **ddp: arguments of `pytorch_lightning.strategies.DDPStrategy`.

    Raises:
        ValueError: an argument is outside its range, or the network's file breaks a rule.
    """


StrategyRegistry.register("auto_network", AutoNetworkStrategy, description="DDP on the best all-reduce for the network")
