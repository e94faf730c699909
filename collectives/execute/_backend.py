"""The c10d backend "trainkit": collectives on schedules, the rest over gloo or NCCL, and every failure an error."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from trainkit.collectives._exchange import Placement
from trainkit.collectives._topology import Topology
from trainkit.collectives.execute._failover import gloo_group
from trainkit.collectives.execute._guarded import Guarded
from trainkit.collectives.execute._messages import Messages
from trainkit.collectives.execute._options import ForestOptions, options_of
from trainkit.collectives.execute._runner import Runner
from trainkit.collectives.execute._schedules import Schedules
from trainkit.collectives.execute._tcp import DTYPES
from trainkit.collectives.execute._work import CollectiveWork

BACKEND = "trainkit"
Tensors = list[torch.Tensor]


def register_backend(topology: Topology, *, options: ForestOptions | None = None, **settings: Any) -> None:
    """Make `init_process_group("trainkit")` run collectives along the network's trees.

    all_reduce (sums and averages), all_gather_into_tensor, reduce_scatter_tensor and broadcast run on schedules, barrier
    on the same connections; all else is passed on to gloo (host memory, behind a meeting of the ranks) or NCCL (GPUs).
    Sub-groups get trees between their own ranks.

    A collective that fails raises from `wait()` and from its future, and no other runs after it in that group. Ranks
    that are alive and late have the time that `init_process_group(timeout=)` gives, unless `timeout_s` says otherwise.

    Args:
        topology: the network; rank r is its r-th compute node.
        options: see `ForestOptions`; `ranks` and `fallback` are not the backend's.
        **settings: single options.

    Raises:
        ValueError: an argument is outside its range.
        TypeError: there is no such option.

    Example:
        >>> register_backend(Topology.load("network.json"))
        >>> torch.distributed.init_process_group("trainkit")
    """
    chosen = options_of(ForestOptions, options, settings, "register_backend")
    if chosen.ranks is not None or chosen.fallback != "error":
        raise ValueError(
            "the backend takes ranks in the order of the compute nodes, and has no fallback: leave both out"
        )

    def create(asked: Any, backend_options: Any) -> "Backend":
        return Backend(topology, asked, chosen)

    dist.Backend.register_backend(BACKEND, create, extended_api=True, devices=["cpu", "cuda"])


class Backend(dist.ProcessGroup):
    """A process group whose collectives follow a network.

    Raises:
        ValueError: the group has a rank that is none of the topology's compute nodes.
        PeerLost: a rank does not come.
    """

    def __init__(self, topology: Topology, asked: Any, options: ForestOptions) -> None:
        rank, size = asked.group_rank, asked.group_size
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._name = str(asked.group_id)
        members = list(asked.global_ranks_in_group) or list(range(size))
        if size > 1 and max(members) >= len(topology.compute_nodes):
            raise ValueError(
                f"the network has {len(topology.compute_nodes)} compute nodes, the group has rank {max(members)}"
            )
        if options.timeout_s is None:
            options = replace(options, timeout_s=asked.timeout.total_seconds())
        timeout = timedelta(seconds=options.patience_s)
        own = _part(asked, "trainkit")
        runner = Runner(Placement(None, own, rank, size), options=options)
        address = runner.address() if size > 1 else "127.0.0.1"
        gloo = gloo_group(_part(asked, "gloo"), rank, size, timeout, address)
        runner.placement = replace(runner.placement, group=gloo)
        self._inner: dict[str, Any] = {"cpu": gloo}
        self._runners = {"cpu": runner}
        if torch.cuda.is_available() and dist.is_nccl_available():
            nccl = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # type: ignore[attr-defined]
            nccl._timeout = timeout
            self._inner["cuda"] = dist.ProcessGroupNCCL(_part(asked, "nccl"), rank, size, nccl)  # type: ignore[attr-defined]
            placement = Placement(self._inner["cuda"], _part(asked, "trainkit-cuda"), rank, size)
            self._runners["cuda"] = Runner(placement, options=options)
        kinds = {"cpu": self.BackendType.GLOO, "cuda": self.BackendType.NCCL}
        for device, inner in self._inner.items():  # what is not overridden below goes there
            self._register_backend(torch.device(device), kinds[device], inner)
        self._set_default_backend(kinds["cuda" if "cuda" in self._inner else "cpu"])
        nodes = [topology.compute_nodes[member] for member in members] if size > 1 else []
        group = None if nodes == list(topology.compute_nodes) else nodes
        self._schedules = Schedules(
            topology, options.chunk_bytes, runner.placement, options.patience_s, runner.heed, group
        )
        self._guarded = Guarded(runner, gloo) if size > 1 else None
        self._messages = Messages(runner, gloo)

    @property
    def group_name(self) -> str:  # type: ignore[override]
        """The name by which torch.distributed knows the group."""
        return self._name

    def getBackendName(self) -> str:  # noqa: N802
        """The name in init_process_group."""
        return BACKEND

    # on schedules

    def allreduce(self, tensors: Tensors, opts: Any = None) -> Any:  # type: ignore[override]
        """Sum or average along the all-reduce trees."""
        opts = opts or dist.AllreduceOptions()  # type: ignore[attr-defined]
        if not all(self._carries(tensor) and _adds(opts.reduceOp, tensor) for tensor in tensors):
            return self._call("allreduce", tensors, tensors, (tensors, opts), _named(opts.reduceOp))
        done = [self._sum("allreduce", tensor, opts.reduceOp, None) for tensor in tensors]
        return self._work(done[-1], tensors)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> Any:  # type: ignore[override]
        """The same for several tensors."""
        return self.allreduce(tensors, opts or dist.AllreduceCoalescedOptions())  # type: ignore[attr-defined]

    def all_gather_single(self, output: torch.Tensor, source: torch.Tensor, opts: Any = None) -> Any:
        """All shards to everybody along the all-gather trees."""
        return self.all_gather_single_coalesced([output], [source], opts)

    def all_gather_single_coalesced(self, outputs: Tensors, sources: Tensors, opts: Any = None) -> Any:
        """The same for several tensors."""
        pairs = list(zip(outputs, sources, strict=True))
        if not all(self._gathers(whole, shard) for whole, shard in pairs):
            opts = opts or dist.AllgatherOptions()  # type: ignore[attr-defined]
            return self._call("allgather_into_tensor_coalesced", outputs, outputs, (outputs, sources, opts))
        done: Future[None] | None = None
        for whole, shard in pairs:
            mine = whole.view(-1)[self.rank() * shard.numel() :][: shard.numel()]
            if mine.data_ptr() != shard.data_ptr():
                mine.copy_(shard.view(-1))
            done = self._submit("allgather", whole, "")
        assert done is not None
        return self._work(done, outputs)

    def reduce_scatter_single(self, output: torch.Tensor, source: torch.Tensor, opts: Any = None) -> Any:
        """Each rank its shard of the sum, along the reduction trees; the input stays as it is."""
        return self.reduce_scatter_single_coalesced([output], [source], opts)

    def reduce_scatter_single_coalesced(self, outputs: Tensors, sources: Tensors, opts: Any = None) -> Any:
        """The same for several tensors."""
        opts = opts or dist.ReduceScatterOptions()  # type: ignore[attr-defined]
        pairs = list(zip(outputs, sources, strict=True))
        if not all(self._gathers(whole, shard) and _adds(opts.reduceOp, whole) for shard, whole in pairs):
            words = _named(opts.reduceOp)
            return self._call("reduce_scatter_tensor_coalesced", outputs, sources, (outputs, sources, opts), words)
        done: Future[None] | None = None
        for shard, source in pairs:
            whole = source.clone().view(-1)

            def take(shard: torch.Tensor = shard, whole: torch.Tensor = whole) -> None:
                shard.view(-1).copy_(whole[self.rank() * shard.numel() :][: shard.numel()])

            done = self._sum("reduce_scatter", whole, opts.reduceOp, take)
        assert done is not None
        return self._work(done, outputs)

    def broadcast(self, tensors: Tensors, opts: Any) -> Any:  # type: ignore[override]
        """From one rank to all along broadcast trees."""
        if not all(self._carries(tensor) for tensor in tensors):
            return self._call("broadcast", tensors, tensors, (tensors, opts), f"from {opts.rootRank}")
        done = [self._submit("broadcast", tensor, "", root=opts.rootRank) for tensor in tensors]
        if self._guarded is not None and not tensors[0].is_cuda:  # the root alone would not see who is missing
            done.append(self._guarded.run("broadcast", None))
        return self._work(done[-1], tensors)

    def barrier(self, opts: Any = None) -> Any:  # type: ignore[override]
        """Return when all ranks have come."""
        if self._guarded is None:
            return self._inner["cpu"].barrier(opts or dist.BarrierOptions())  # type: ignore[attr-defined]
        if "cuda" in self._inner and torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.current_stream().synchronize()
        return self._work(self._guarded.run("barrier", None), [])

    # over gloo or NCCL

    def reduce(self, tensors: Tensors, opts: Any = None) -> Any:  # type: ignore[override]
        """To one rank."""
        opts = opts or dist.ReduceOptions()  # type: ignore[attr-defined]
        return self._call("reduce", tensors, tensors, (tensors, opts), f"{_named(opts.reduceOp)} to {opts.rootRank}")

    def allgather(self, outputs: list[Tensors], sources: Tensors, opts: Any = None) -> Any:  # type: ignore[override]
        """All tensors to everybody."""
        opts = opts or dist.AllgatherOptions()  # type: ignore[attr-defined]
        return self._call("allgather", outputs[0], sources, (outputs, sources, opts))

    def allgather_coalesced(self, outputs: list[Tensors], sources: Tensors, opts: Any = None) -> Any:
        """The same for several tensors."""
        opts = opts or dist.AllgatherOptions()  # type: ignore[attr-defined]
        flat = [tensor for row in outputs for tensor in row]
        return self._call("allgather_coalesced", flat, sources, (outputs, sources, opts))

    def gather(self, outputs: list[Tensors], sources: Tensors, opts: Any = None) -> Any:  # type: ignore[override]
        """All tensors to one rank."""
        opts = opts or dist.GatherOptions()  # type: ignore[attr-defined]
        flat = [tensor for row in outputs for tensor in row]
        return self._call("gather", flat, sources, (outputs, sources, opts), f"to {opts.rootRank}")

    def scatter(self, outputs: Tensors, sources: list[Tensors], opts: Any = None) -> Any:  # type: ignore[override]
        """A tensor to each rank from one."""
        opts = opts or dist.ScatterOptions()  # type: ignore[attr-defined]
        return self._call("scatter", outputs, outputs, (outputs, sources, opts), f"from {opts.rootRank}")

    def reduce_scatter(self, outputs: Tensors, sources: list[Tensors], opts: Any = None) -> Any:  # type: ignore[override]
        """Each rank its part of the sum, from lists."""
        opts = opts or dist.ReduceScatterOptions()  # type: ignore[attr-defined]
        flat = [tensor for row in sources for tensor in row]
        return self._call("reduce_scatter", outputs, flat, (outputs, sources, opts), _named(opts.reduceOp))

    def all_to_all_single(
        self, output: torch.Tensor, source: torch.Tensor, received: list[int], sent: list[int], opts: Any = None
    ) -> Any:
        """A part of each rank's tensor to every other; the parts' sizes may differ from rank to rank."""
        opts = opts or dist.AllToAllOptions()  # type: ignore[attr-defined]
        equal = "" if received or sent else str(source.numel())
        arguments = (output, source, received, sent, opts)
        return self._call("alltoall_base", [output], [source], arguments, f"parts {equal}", sizes=False)

    def alltoall(self, outputs: Tensors, sources: Tensors, opts: Any = None) -> Any:
        """The same for lists."""
        opts = opts or dist.AllToAllOptions()  # type: ignore[attr-defined]
        return self._call("alltoall", outputs, sources, (outputs, sources, opts), sizes=False)

    def send(self, tensors: Tensors, peer: int, tag: int) -> Any:  # type: ignore[override]
        """To one rank; no other takes part."""
        if tensors[0].is_cuda:
            return self._inner["cuda"].send(tensors, peer, tag)
        return self._messages.send(tensors[0], peer, tag)

    def recv(self, tensors: Tensors, peer: int, tag: int) -> Any:  # type: ignore[override]
        """From one rank."""
        if tensors[0].is_cuda:
            return self._inner["cuda"].recv(tensors, peer, tag)
        return self._messages.receive(tensors[0], peer, tag)

    def recv_anysource(self, tensors: Tensors, tag: int) -> Any:
        """From any rank."""
        return self._messages.receive(tensors[0], None, tag)

    # what older and newer versions of PyTorch call them
    _allgather_base = all_gather_single  # type: ignore[assignment]
    allgather_into_tensor_coalesced = all_gather_single_coalesced  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]
    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def _sum(
        self, collective: str, tensor: torch.Tensor, op: Any, finish: Callable[[], object] | None
    ) -> "Future[None]":
        if op == dist.ReduceOp.AVG:
            tensor.div_(self.size())
        return self._submit(collective, tensor, _named(op), finish)

    def _submit(
        self,
        collective: str,
        tensor: torch.Tensor,
        what: str,
        finish: Callable[[], object] | None = None,
        root: int | None = None,
    ) -> "Future[None]":
        schedule = self._schedules.get(collective, tensor.nbytes, root, tensor.device.type)
        return self._runners[tensor.device.type].submit(schedule, tensor, what, finish)

    def _work(self, done: "Future[None]", tensors: Sequence[torch.Tensor]) -> CollectiveWork:
        device = tensors[0].device if tensors else torch.device("cpu")
        runner = self._runners[device.type]
        return CollectiveWork(done, tensors, runner.awaited, runner.behind(device))

    def _call(
        self,
        name: str,
        results: Tensors,
        sources: Tensors,
        arguments: tuple[Any, ...],
        how: str = "",
        *,
        sizes: bool = True,
    ) -> Any:
        """A collective of gloo's or NCCL's.

        Args:
            name: the inner backend's method.
            results: what it writes to.
            sources: what it reads; their number, sizes and dtypes must be equal on all ranks.
            arguments: of the method.
            how: what else must be equal.
            sizes: whether sizes must be equal.
        """
        inner = self._of(results or sources)
        if self._guarded is None or inner is not self._inner["cpu"]:
            return getattr(inner, name)(*arguments)
        shapes = [(str(tensor.dtype), tensor.numel() if sizes else 0) for tensor in sources]
        what = f"{name} {how} of {shapes}"
        return self._work(self._guarded.run(what, lambda: getattr(inner, name)(*arguments)), results)

    def _carries(self, tensor: torch.Tensor) -> bool:
        return (
            self.size() > 1 and tensor.is_contiguous() and tensor.dtype in DTYPES and tensor.device.type in self._inner
        )

    def _gathers(self, whole: torch.Tensor, shard: torch.Tensor) -> bool:
        return self._carries(whole) and self._carries(shard) and whole.numel() == shard.numel() * self.size()

    def _of(self, tensors: Tensors) -> Any:
        return self._inner[tensors[0].device.type]

    def abort(self) -> None:
        """Give up what runs, on all ranks."""
        self.shutdown()

    def shutdown(self) -> None:
        """Let the connections go."""
        for runner in self._runners.values():
            runner.close()
        for inner in self._inner.values():
            inner.shutdown()


def _adds(op: Any, tensor: torch.Tensor) -> bool:
    return bool(op == dist.ReduceOp.SUM or (op == dist.ReduceOp.AVG and tensor.is_floating_point()))


def _named(op: Any) -> str:
    """The same on all ranks; its own text is an address in memory."""
    return str(op.op.name)


def _part(asked: Any, name: str) -> Any:
    return PrefixStore(name, asked.store)
