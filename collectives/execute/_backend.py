"""The c10d backend "trainkit": collectives on schedules, the rest over gloo or NCCL."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroupGloo

from trainkit.collectives._topology import Topology
from trainkit.collectives.execute._runner import Runner, Seat, Way, check_options
from trainkit.collectives.execute._schedules import Schedules
from trainkit.collectives.execute._tcp import DTYPES

NAME = "trainkit"


def register_backend(
    topology: Topology,
    *,
    deadline_s: float = 30.0,
    transport: Way = "auto",
    interface: str | None = None,
    chunk_bytes: int | None = None,
) -> None:
    """Make `init_process_group("trainkit")` run collectives along the network's trees.

    all_reduce (sums and averages), all_gather_into_tensor, reduce_scatter_tensor and broadcast run on schedules; all
    else is passed on to gloo (host memory) or NCCL (GPUs). Sub-groups get trees between their own ranks.

    Args:
        topology: the network; rank r is its r-th compute node.
        deadline_s: see `Runner`.
        transport: see `Runner`.
        interface: see `Runner`.
        chunk_bytes: see `ForestState`.

    Raises:
        ValueError: an argument is outside its range.

    Example:
        >>> register_backend(Topology.load("network.json"))
        >>> torch.distributed.init_process_group("trainkit")
    """
    check_options(deadline_s, transport)
    options = {"deadline_s": deadline_s, "transport": transport, "interface": interface}

    def create(asked: Any, backend_options: Any) -> "Backend":
        return Backend(topology, asked, chunk_bytes, options)

    dist.Backend.register_backend(NAME, create, extended_api=True, devices=["cpu", "cuda"])


class Backend(dist.ProcessGroup):
    """A process group whose collectives follow a network.

    Raises:
        ValueError: the group has a rank that is none of the topology's compute nodes.
    """

    def __init__(self, topology: Topology, asked: Any, chunk_bytes: int | None, options: dict[str, Any]) -> None:
        rank, size = asked.group_rank, asked.group_size
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._name = str(asked.group_id)
        members = list(asked.global_ranks_in_group) or list(range(size))
        if max(members) >= len(topology.compute_nodes):
            raise ValueError(
                f"the network has {len(topology.compute_nodes)} compute nodes, the group has rank {max(members)}"
            )
        self._inner: dict[str, Any] = {"cpu": ProcessGroupGloo(_part(asked, "gloo"), rank, size, asked.timeout)}
        if torch.cuda.is_available() and dist.is_nccl_available():
            nccl = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)  # type: ignore[attr-defined]
            nccl._timeout = asked.timeout
            self._inner["cuda"] = dist.ProcessGroupNCCL(_part(asked, "nccl"), rank, size, nccl)  # type: ignore[attr-defined]
        kinds = {"cpu": self.BackendType.GLOO, "cuda": self.BackendType.NCCL}
        for device, inner in self._inner.items():  # what is not overridden below goes there
            self._register_backend(torch.device(device), kinds[device], inner)
        self._set_default_backend(kinds["cuda" if "cuda" in self._inner else "cpu"])
        own = _part(asked, "trainkit")
        nodes = [topology.compute_nodes[member] for member in members]
        whole = nodes == list(topology.compute_nodes)
        self._schedules = Schedules(topology, chunk_bytes, own, rank, None if whole else nodes)
        self._runner = Runner(Seat(self._inner["cpu"], own, rank, size), **options)
        if "cuda" in self._inner:
            self._runner_cuda = Runner(Seat(self._inner["cuda"], own, rank, size), **options)

    @property
    def group_name(self) -> str:  # type: ignore[override]
        """The name by which torch.distributed knows the group."""
        return self._name

    def getBackendName(self) -> str:  # noqa: N802
        """The name in init_process_group."""
        return NAME

    def allreduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Any:  # type: ignore[override]
        """Sum or average along the all-reduce trees."""
        opts = opts or dist.AllreduceOptions()  # type: ignore[attr-defined]
        (tensor,) = tensors if len(tensors) == 1 else (None,)
        if tensor is None or not self._carries(tensor) or not _adds(opts.reduceOp, tensor):
            return self._of(tensors[0]).allreduce(tensors, opts)
        if opts.reduceOp == dist.ReduceOp.AVG:
            tensor.div_(self.size())
        return self._run("allreduce", tensor, lambda: tensor)

    def all_gather_single(self, output: torch.Tensor, source: torch.Tensor, opts: Any = None) -> Any:
        """All shards to everybody along the all-gather trees."""
        if not (self._carries(output) and self._carries(source)) or output.numel() != source.numel() * self.size():
            return self._of(output)._allgather_base(output, source, opts or dist.AllgatherOptions())  # type: ignore[attr-defined]
        mine = output.view(-1)[self.rank() * source.numel() :][: source.numel()]
        if mine.data_ptr() != source.data_ptr():
            mine.copy_(source.view(-1))
        return self._run("allgather", output, lambda: output)

    def reduce_scatter_single(self, output: torch.Tensor, source: torch.Tensor, opts: Any = None) -> Any:
        """Each rank its shard of the sum, along the reduction trees; the input stays as it is."""
        opts = opts or dist.ReduceScatterOptions()  # type: ignore[attr-defined]
        fits = self._carries(output) and self._carries(source) and source.numel() == output.numel() * self.size()
        if not fits or not _adds(opts.reduceOp, source):
            return self._of(output)._reduce_scatter_base(output, source, opts)
        whole = source.clone().view(-1)
        if opts.reduceOp == dist.ReduceOp.AVG:
            whole.div_(self.size())

        def take() -> torch.Tensor:
            return output.view(-1).copy_(whole[self.rank() * output.numel() :][: output.numel()])

        return self._run("reduce_scatter", whole, take)

    _allgather_base = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> Any:  # type: ignore[override]
        """From one rank to all along broadcast trees."""
        if len(tensors) != 1 or not self._carries(tensors[0]):
            return self._of(tensors[0]).broadcast(tensors, opts)
        return self._run("broadcast", tensors[0], lambda: tensors[0], opts.rootRank)

    def _run(
        self, collective: str, tensor: torch.Tensor, finish: Callable[[], torch.Tensor], root: int | None = None
    ) -> Any:
        runner = self._runner_cuda if tensor.is_cuda else self._runner
        done = runner.submit(self._schedules.get(collective, tensor.nbytes, root, tensor.device.type), tensor)
        future = torch.futures.Future[list[torch.Tensor]](devices=[tensor.device] if tensor.is_cuda else None)

        def ended(done: Any) -> None:
            error = done.exception()
            if error is None:
                future.set_result([finish()])
            else:
                future.set_exception(error)

        with runner.behind(tensor.device):
            done.add_done_callback(ended)
        return torch._C._distributed_c10d._create_work_from_future(future)  # type: ignore[attr-defined]

    def _carries(self, tensor: torch.Tensor) -> bool:
        return (
            self.size() > 1 and tensor.is_contiguous() and tensor.dtype in DTYPES and tensor.device.type in self._inner
        )

    def _of(self, tensor: torch.Tensor) -> Any:
        return self._inner[tensor.device.type]

    def shutdown(self) -> None:
        """Let the connections go."""
        self._runner.close()
        if "cuda" in self._inner:
            self._runner_cuda.close()
        for inner in self._inner.values():
            inner.shutdown()


def _adds(op: Any, tensor: torch.Tensor) -> bool:
    return bool(op == dist.ReduceOp.SUM or (op == dist.ReduceOp.AVG and tensor.is_floating_point()))


def _part(asked: Any, name: str) -> Any:
    return PrefixStore(name, asked.store)
