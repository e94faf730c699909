"""The automatic network: measure it, plan, reduce the gradients that way, and look whether the plan was right."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed as dist

from trainkit._planner import Algorithm, NetworkPlan, plan_network, plan_of, plan_said
from trainkit.collectives import ForestState, ProbeError, Topology, forest_hook, probe
from trainkit.collectives._exchange import Exchange, Placement
from trainkit.collectives._probe import placed, placements
from trainkit.collectives._said import topology_of, topology_said
from trainkit.collectives.execute._ddp import check_group
from trainkit.collectives.execute._options import options_of
from trainkit.integrations._stopwatch import Stopwatch
from trainkit.switchml import SwitchMLState, switchml_hook

_SETTLING = 2
"""Steps on the process group's ring before planning: DDP rebuilds its buckets after the first."""
_PLANNING_S = 1800.0
"""Seconds for rank 0 to plan, and for a rank to come to the next look at the times."""
_Tensors = torch.futures.Future[torch.Tensor]


@dataclass(frozen=True)
class NetworkOptions:
    """Options of `NetworkState` and `AutoNetworkStrategy`.

    Raises:
        ValueError: a value is outside its range.
    """

    switch: tuple[str, str] | None = None
    """("host:port", its node in the network) of a SwitchML switch to consider."""
    token_file: str | None = None
    """The switch's secret."""
    interface: str | None = None
    """Network interface to use; None takes GLOO_SOCKET_IFNAME's, or the one that leads to the other ranks."""
    timeout_s: float = 30.0
    """Seconds without progress after which a bucket fails with a named error."""
    fallback: Literal["error", "allreduce"] = "error"
    """"allreduce" goes on with the process group when a schedule or the switch fails."""
    window: int = 50
    """Training steps between two looks at the time of communication."""
    drift: float = 0.3
    """A window's time that is off the first one's by more than this part, twice running, has the network probed and
    planned anew."""

    def __post_init__(self) -> None:
        if self.window < 1:
            raise ValueError(f"window is a number of steps of at least 1, got {self.window}")
        if not self.drift > 0:
            raise ValueError(f"drift is a part above 0, such as 0.3, got {self.drift}")
        if not self.timeout_s > 0:
            raise ValueError(f"timeout_s must be seconds above 0, got {self.timeout_s}")
        if self.fallback not in ("error", "allreduce"):
            raise ValueError(f'fallback must be "error" or "allreduce", got {self.fallback!r}')
        if self.switch is not None and (isinstance(self.switch, str) or len(self.switch) != 2):
            raise ValueError(f'switch is ("host:port", its node in the network), got {self.switch!r}')


@dataclass(frozen=True)
class Comparison:
    """A plan's prediction beside what happened."""

    algorithm: str
    """The algorithm that was taken."""
    steps: int
    """Training steps that the measurement is the median of."""
    predicted_s: float
    """Seconds of communication in a step, predicted."""
    measured_s: float
    """Measured: the least over the ranks, since an early rank's time includes waiting for a late one."""

    def __str__(self) -> str:
        off = self.measured_s / self.predicted_s - 1
        return (
            f"{self.algorithm}: predicted {self.predicted_s:.4g} s of communication a step, "
            f"measured {self.measured_s:.4g} s over {self.steps} steps ({off:+.0%})"
        )


class NetworkState:
    """The state of `auto_network_hook`: plans once the buckets are known, and watches the network. One for each model.

    Args:
        network: what to plan for, or its file: one compute node a rank, in the order of the ranks unless the probe wrote
            it, whose hosts are known by their addresses; rank 0's counts. None probes.
        process_group: the ranks, those of the DDP model; None is the default group.
        options: see `NetworkOptions`.
        **settings: single options, such as `window=100`.

    Raises:
        ValueError: an argument is outside its range, or the network's file breaks a rule.
        TypeError: there is no such option.
    """

    def __init__(
        self,
        network: str | Path | Topology | None = None,
        *,
        process_group: "dist.ProcessGroup | None" = None,
        options: NetworkOptions | None = None,
        **settings: Any,
    ) -> None:
        self.options = options_of(NetworkOptions, options, settings, "NetworkState")
        self.network = Topology.load(network) if isinstance(network, str | Path) else network
        self.plan: NetworkPlan | None = None
        """The plan in force; None in the first steps."""
        self.comparisons: list[Comparison] = []
        """Prediction and measurement, one a window."""
        self._group = process_group
        self._reset()

    def _reset(self) -> None:
        self._placement: Placement | None = None
        self._exchange: Exchange | None = None
        self._reduce: Callable[[Any], _Tensors] = self._over(self._group)
        self._backend: ForestState | SwitchMLState | None = None
        self._address: str | None = None
        self._ring: dist.ProcessGroup | None = None
        self._sizes: list[tuple[int, int]] = []
        self._clock = Stopwatch()
        self._step = self._since_plan = self._strikes = 0

    def __getstate__(self) -> dict[str, Any]:
        return {"options": self.options, "network": self.network}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, plan=None, comparisons=[], _group=None)
        self._reset()

    def average(self, bucket: Any) -> _Tensors:
        """Average one gradient bucket the planned way."""
        if bucket.index() == 0:
            self.connect()
            if self._step == 0:
                check_group(bucket, self._group, "NetworkState")
            self._next_step()
        buffer = bucket.buffer()
        self._sizes.append((buffer.nbytes, buffer.itemsize))
        stop = self._clock.start(buffer.device)
        future = self._reduce(bucket)
        return future.then(lambda done: (stop(), done.value())[1])  # type: ignore[func-returns-value]

    @property
    def error(self) -> Exception | None:
        """What the switch or the executor failed with."""
        return self._backend.error if self._backend is not None else None

    @property
    def ran(self) -> Any:
        """The schedule of the newest bucket, where the network's plan has one."""
        return getattr(self._backend, "ran", None)

    def counters(self) -> dict[str, float]:
        """What the executor or the switch has counted, so far."""
        return dict(self._backend.counters()) if self._backend is not None else {}

    def connect(self) -> None:
        """Meet the other ranks, unless that is done; all do so at the same time.

        Raises:
            ValueError: the network that was given is not one of this job's ranks, or a rank has no such interface.
        """
        if self._placement is not None:
            return
        placement = Placement.of(self._group, "network plans")
        exchange = Exchange(placement.store, placement.rank, placement.size, _PLANNING_S)
        # a file may differ from host to host, and ranks with other networks would wait for each other
        said = exchange.from_first(None if self.network is None else topology_said(self.network))
        network = None if said is None else topology_of(said)
        if placement.size > 1:
            if network is not None and len(network.compute_nodes) != placement.size:
                raise ValueError(
                    f"a network plan needs one compute node a rank: {network.name} has "
                    f"{len(network.compute_nodes)}, the job {placement.size} ranks: probe with as many ranks a host as "
                    "the job has"
                )
            everyone = placements(exchange, self.options.interface)
            self._address = everyone[placement.rank]["address"]
            network = network and placed(network, everyone)
        self.network, self._placement, self._exchange = network, placement, exchange

    def close(self) -> None:
        """Leave the switch or the executor; the next bucket would join anew."""
        if self._backend is not None:
            self._backend.close()

    def _next_step(self) -> None:
        sizes, self._sizes = self._sizes, []
        if self._step > 0:
            self._clock.end_step()
        self._step += 1
        if self._step == _SETTLING + 1:
            self._replan(sizes, self.network)
        elif len(self._clock.steps) >= self.options.window:
            self._look_back(sizes)

    def _look_back(self, sizes: Sequence[tuple[int, int]]) -> None:
        measured = median(self._clock.read())
        if self.plan is None:
            return
        chosen = self.plan.chosen
        now = Comparison(
            chosen.name, self.options.window, chosen.step_s, min(map(float, self._meet().gather(measured)))
        )
        self.comparisons.append(now)
        self._since_plan += 1
        if self._since_plan == 1:
            self._reference = now.measured_s
            self._say(f"network plan, {now}")
            return
        drifted = abs(now.measured_s / self._reference - 1) > self.options.drift
        self._strikes = self._strikes + 1 if drifted else 0
        if self._strikes == 2:
            self._say(f"the network drifted: {now}, {self._reference:.4g} s before; probing and planning anew")
            # where the probe fails, this is the new normal, not a reason to probe again and again
            self._strikes, self._reference = 0, now.measured_s
            self._replan(sizes, None)

    def _replan(self, sizes: Sequence[tuple[int, int]], network: Topology | None) -> None:
        """Plan for a network and change over to what is chosen; without one, for what a probe finds.

        Args:
            sizes: of each bucket, its bytes and those of one gradient.
            network: None probes.
        """
        assert self._placement is not None
        if self._placement.size == 1:
            self._say("no network plan: there is one rank, and nothing to reduce over a network")
            return
        try:
            network = network or probe(self._group, interface=self._address)
        except ProbeError as error:
            # the same on every rank
            self._say(f"no network plan: {error}; gradients go on as before")
            return
        # One rank plans: a search that ends by the clock could end differently elsewhere.
        said = self._meet().from_first(self._planned(network, sizes) if self._placement.rank == 0 else None)
        if "failed" in said:
            if self.plan is None:
                raise ValueError(said["failed"]) if said["refused"] else RuntimeError(said["failed"])
            self._say(f"no new network plan: {said['failed']}; gradients go on as before")
            return
        left = self._backend.groups if isinstance(self._backend, SwitchMLState) else []
        left += [self._ring] if self._ring is not None else []
        self.close()
        self.network, self.plan = network, plan_of(said)
        self._destroy(left)
        self._adopt(self.plan.chosen)
        self._since_plan = self._strikes = 0
        self._clock.read()
        if self._placement.rank == 0:
            _show(self.plan)

    def _planned(self, network: Topology, sizes: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """The plan, or whatever is in its way: the other ranks must not wait for it."""
        buckets, itemsizes = zip(*sizes, strict=True)
        backend: Literal["gloo", "nccl"] = "nccl" if dist.get_backend(self._group) == "nccl" else "gloo"
        switch = self.options.switch[1] if self.options.switch is not None else None
        if self.plan is not None and switch not in network.nodes:
            switch = None  # a probe finds no switch by its name
        try:
            return plan_said(plan_network(network, buckets, itemsizes=itemsizes, switch=switch, backend=backend))
        except ValueError as error:
            return {"failed": str(error), "refused": True}
        except Exception as error:
            return {"failed": f"{type(error).__name__}: {error}", "refused": False}

    def _meet(self) -> Exchange:
        assert self._exchange is not None
        return self._exchange

    def _say(self, words: str) -> None:
        if self._placement is not None and self._placement.rank == 0:
            print(f"trainkit: {words}", file=sys.stderr)

    def _destroy(self, groups: Sequence[dist.ProcessGroup]) -> None:
        """Let go of the process groups of the algorithm that was left; the same on all ranks."""
        self._ring, self._backend, self._reduce = None, None, self._over(self._group)
        if groups:
            if torch.cuda.is_available():
                torch.cuda.current_stream().synchronize()  # it waits for the last step's gradients
            # a rank whose own part is done may still have what another one is to get
            self._meet().gather(None)
        for group in groups:
            dist.destroy_process_group(group)

    def _adopt(self, algorithm: Algorithm) -> None:
        options = self.options
        if algorithm.schedule is not None:
            forest = ForestState(
                algorithm.schedule, process_group=self._group, interface=self._address, timeout_s=options.timeout_s,
                fallback=options.fallback,
            )  # fmt: skip
            self._backend, self._reduce = forest, lambda bucket: forest_hook(forest, bucket)
        elif algorithm.name == "switchml":
            assert options.switch is not None
            switch = SwitchMLState(
                options.switch[0], process_group=self._group, token_file=options.token_file, interface=options.interface,
                timeout_s=options.timeout_s, fallback=options.fallback,
            )  # fmt: skip
            self._backend, self._reduce = switch, lambda bucket: switchml_hook(switch, bucket)
        elif algorithm.name == "reordered ring":
            assert self.network is not None
            members = dist.get_process_group_ranks(self._group or dist.group.WORLD)
            ranks = [members[self.network.compute_nodes.index(name)] for name in algorithm.order or ()]
            alone = len(members) < dist.get_world_size()  # other groups' ranks do not come to make it
            self._ring = dist.new_group(ranks, sort_ranks=False, use_local_synchronization=alone)
            self._reduce = self._over(self._ring)
        if self._backend is not None:
            self._backend.connect()

    @staticmethod
    def _over(group: "dist.ProcessGroup | None") -> Callable[[Any], _Tensors]:
        return partial(_over_group, group)


def _over_group(group: "dist.ProcessGroup | None", bucket: Any) -> _Tensors:
    work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size(group)), group=group, async_op=True)
    done: _Tensors = work.get_future().then(lambda future: future.value()[0])
    return done


def _show(plan: NetworkPlan) -> None:
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
