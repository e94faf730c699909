"""The hook, the strategy and the backend, in processes: equal to the process group's, faults named, the fallback."""

import copy
import itertools
import os
import pickle
import signal
import threading
import time
import warnings
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from execute_ranks import processes
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from trainkit.collectives import (
    ExecutionError,
    ForestState,
    PeerLost,
    Topology,
    allreduce_forest,
    forest,
    forest_hook,
    register_backend,
    ring_schedule,
)
from trainkit.collectives._exchange import Placement
from trainkit.collectives.execute._schedules import Schedules
from trainkit.collectives.execute._trees import trees_of, trees_said


def clique(size: int) -> Topology:
    names = [f"n{rank}" for rank in range(size)]
    return Topology("clique", names, names, [(u, v, 1) for u, v in itertools.permutations(names, 2)])


def line(size: int) -> Topology:
    """Only neighbours are linked: most ranks see a death only through others."""
    names = [f"n{rank}" for rank in range(size)]
    return Topology(
        "line", names, names, [link for u, v in itertools.pairwise(names) for link in ((u, v, 1), (v, u, 1))]
    )


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(33, 65), torch.nn.Tanh(), torch.nn.Linear(65, 33))


def train(state: ForestState | None, rank: int, steps: int, at_step: Any = None) -> list[float]:
    """Losses and, at the end, all parameters."""
    ddp = DistributedDataParallel(net(), bucket_cap_mb=0.01)
    if state is not None:
        ddp.register_comm_hook(state, forest_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    numbers = torch.Generator().manual_seed(rank)
    seen = []
    for step in range(steps):
        if at_step is not None:
            at_step(step)
        inputs = torch.randn(4, 33, generator=numbers)
        loss = (ddp(inputs) - inputs).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        seen.append(loss.item())
    return [*seen, *torch.cat([p.detach().flatten() for p in ddp.parameters()]).tolist()]


def _hooks(rank: int) -> list[list[float]]:
    made = [
        ForestState(topology=clique(3), chunk_bytes=256),
        ForestState(ring_schedule(clique(3)), transport="gloo"),
        pickle.loads(pickle.dumps(ForestState(topology=line(3), fallback="allreduce"))),
    ]
    results = [train(state, rank, 6) for state in (None, *made, ForestState(topology=clique(3), chunk_bytes=256))]
    assert all(state.counters()["received_bytes"] > 0 for state in made)
    dist.barrier()
    for state in made:
        state.close()
    return results


def test_hook_trains_as_ddp_does() -> None:
    results = processes(_hooks, 3)
    parameters = [[run[6:] for run in results[rank]] for rank in range(3)]
    assert parameters[0] == parameters[1] == parameters[2]  # the same bits on all ranks
    assert parameters[0][1] == parameters[0][4]  # and in every run
    for run in results[0][1:]:
        assert run == pytest.approx(results[0][0], abs=1e-6)


def _dies(rank: int, transport: str, how: int) -> tuple[str, int, float]:
    state = ForestState(topology=line(5), timeout_s=4.0, transport=transport)  # type: ignore[arg-type]
    died: list[float] = []

    def at_step(step: int) -> None:
        if step == 3:
            dist.barrier()
            died.append(time.monotonic())
            if rank == 3:
                os.kill(os.getpid(), how)

    with pytest.raises(RuntimeError):
        train(state, rank, 6, at_step)
    assert isinstance(state.error, PeerLost)
    return str(state.error), state.error.rank, time.monotonic() - died[0]


@pytest.mark.parametrize(
    ("transport", "how"), [("tcp", signal.SIGKILL), ("tcp", signal.SIGSTOP), ("gloo", signal.SIGKILL)]
)
def test_a_rank_that_dies_is_named_on_every_rank(transport: str, how: int) -> None:
    results = processes(_dies, 5, transport, how, expect=4)
    assert sorted(results) == [0, 1, 2, 4]
    for told, culprit, _ in results.values():
        assert culprit == 3 and "rank 3" in told


def _goes_on(rank: int) -> list[float]:
    state = ForestState(topology=line(4), fallback="allreduce", timeout_s=15.0)

    def at_step(step: int) -> None:
        if step == 3 and rank == 2:  # its connections fail while others are in the middle of a bucket
            assert state.runner is not None
            threading.Timer(0.001, state.runner.transport("tcp").abort).start()  # type: ignore[attr-defined]

    trained = train(state, rank, 10, at_step)
    dist.barrier()
    assert state.error is None
    assert state._failover is not None and state._failover.cause is not None
    state.close()
    return trained


def _plainly(rank: int) -> list[float]:
    return train(None, rank, 10)


@pytest.mark.parametrize("attempt", range(3))
def test_training_goes_on_over_the_fallback(attempt: int) -> None:
    results, plain = processes(_goes_on, 4), processes(_plainly, 4)
    assert len({str(run[10:]) for run in results.values()}) == 1
    for rank in range(4):
        assert results[rank] == pytest.approx(plain[rank], abs=1e-5)


def _fallback_fails_too(rank: int) -> str:
    state = ForestState(topology=line(3), fallback="allreduce", timeout_s=8.0)
    state.all_reduce(torch.ones(8)).wait()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    with pytest.raises(RuntimeError):
        state.all_reduce(torch.ones(8)).wait()
    assert isinstance(state.error, ExecutionError)
    return str(state.error)


def test_a_dead_rank_ends_the_fallback_with_its_name() -> None:
    results = processes(_fallback_fails_too, 3, expect=2)
    assert all("rank 1" in told and "the process group's all-reduce" in told for told in results.values())


def _sharded(rank: int, backend: str, size: int) -> list[float]:
    warnings.simplefilter("ignore")
    if backend == "trainkit":
        register_backend(clique(size), timeout_s=20.0, chunk_bytes=64)
    dist.init_process_group(backend)
    model = net()
    for layer in model:
        if next(layer.parameters(), None) is not None:
            fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    numbers = torch.Generator().manual_seed(rank)
    seen = []
    for _ in range(8):
        inputs = torch.randn(4, 33, generator=numbers)
        loss = (model(inputs) - inputs).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(loss.item())
    seen += [value for p in model.parameters() for value in p.full_tensor().flatten().tolist()]  # type: ignore[attr-defined]
    seen += train(None, rank, 2)
    for op, dtype in itertools.product(("SUM", "AVG", "MAX", "MIN"), (torch.float32, torch.int64, torch.bool)):
        if (op == "AVG") == (dtype == torch.float32) or op in ("MAX", "MIN"):
            value = torch.arange(7).add(rank).to(dtype)
            if op != "AVG" or backend == "trainkit":  # gloo has none
                dist.all_reduce(value, getattr(dist.ReduceOp, op))
            else:
                dist.all_reduce(value)
                value /= size
            seen += value.tolist()
    for source in range(size):
        value = torch.full((5,), float(rank))
        dist.broadcast(value, source)
        seen += value.tolist()
    pair = dist.new_group([0, size - 1])
    if rank in (0, size - 1):
        value = torch.full((3,), rank + 1)
        dist.all_reduce(value, group=pair)
        seen += value.tolist()
    parts = [torch.zeros(2) for _ in range(size)]
    dist.all_gather(parts, torch.full((2,), float(rank)))
    swapped = torch.zeros(size)
    dist.all_to_all_single(swapped, torch.arange(float(size)) + 10 * rank)
    seen += [value for part in (*parts, swapped) for value in part.tolist()]
    if backend == "trainkit":
        assert dist.group.WORLD._runners["cpu"].counters()["sent_bytes"] > 0  # type: ignore[union-attr]
    dist.barrier()
    return seen


@pytest.mark.parametrize("size", [2, 3])
def test_backend_under_fsdp2_ddp_and_everything_else(size: int) -> None:
    ours = processes(_sharded, size, "trainkit", size, backend="")
    theirs = processes(_sharded, size, "gloo", size, backend="")
    for rank in range(size):
        assert ours[rank] == pytest.approx(theirs[rank], abs=1e-5)


def test_every_rank_is_told_that_there_are_no_trees() -> None:
    store = dist.HashStore()
    ranks = [
        Schedules(clique(2), None, Placement(None, dist.PrefixStore("x", store), rank, 2), 5.0, group=["nowhere"])
        for rank in range(2)
    ]
    with pytest.raises(ValueError, match="group must name") as first:
        ranks[0].get("allreduce", 1000)
    with pytest.raises(ValueError, match="rank 0 found no trees for allreduce: ") as second:  # without a wait
        ranks[1].get("allreduce", 1000)
    assert str(first.value) in str(second.value)


@pytest.mark.parametrize("collective", ["allreduce", "allgather", "reduce_scatter", "broadcast"])
def test_trees_arrive_as_they_were_and_nothing_is_unpickled(collective: str) -> None:
    network = Topology(
        "odd", list("abcs"), list("abc"), [(u, v, Fraction(1, 3)) for u, v in itertools.permutations("abcs", 2)]
    )
    store = dist.HashStore()
    ranks = [Schedules(network, None, Placement(None, store, rank, 3), 5.0) for rank in range(2)]
    root = 1 if collective == "broadcast" else None
    assert ranks[0].get(collective, 1 << 20, root) == ranks[1].get(collective, 1 << 20, root)
    bomb = pickle.dumps(pytest.fail).decode("latin1")
    good = trees_said(allreduce_forest(network))
    for said in (bomb, None, [], {}, {**good, "reduce": {}}, {**good, "time_per_byte": "1/0"}, _bent(good)):
        with pytest.raises(ValueError):
            trees_of(said)


def _bent(said: Any) -> Any:
    """An edge that points outside the network."""
    bent = copy.deepcopy(said)
    bent["broadcast"]["flat"]["edge_head"][0] = 99
    return bent


def test_the_old_name_still_works_and_says_so() -> None:
    with pytest.warns(DeprecationWarning, match="deadline_s= is now timeout_s="):
        assert ForestState(topology=clique(2), deadline_s=3.0).options.timeout_s == 3.0
    with pytest.raises(TypeError, match="ForestState has no option 'lanes'; its options are ranks, timeout_s"):
        ForestState(topology=clique(2), lanes=2)


def _alone(rank: int) -> list[float]:
    """A debug run: one rank, and the network of eight."""
    state = ForestState(topology=clique(8), fallback="allreduce")
    trained = train(state, rank, 4)
    assert trained == pytest.approx(train(None, rank, 4), abs=1e-6)
    state.close()
    return trained


def test_one_rank_needs_no_network() -> None:
    assert len(processes(_alone, 1)) == 1


def test_wrong_arguments_are_told(tmp_path: Path) -> None:
    topology = clique(2)
    with pytest.raises(ValueError, match="either the schedule to run or the topology"):
        ForestState()
    with pytest.raises(ValueError, match="either the schedule to run or the topology"):
        ForestState(allreduce_forest(topology).schedule(), topology)
    with pytest.raises(ValueError, match="need an allreduce schedule, got allgather"):
        ForestState(forest(topology).schedule())
    with pytest.raises(ValueError, match="fallback must be"):
        ForestState(topology=topology, fallback="ring")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="chunk_bytes must be at least 1"):
        ForestState(topology=topology, chunk_bytes=0)
    with pytest.raises(ValueError, match="timeout_s must be"):
        register_backend(topology, timeout_s=-1)
