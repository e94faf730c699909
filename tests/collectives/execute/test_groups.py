"""Process groups: sub-groups, another group than DDP's, two models; and memory that stays as it is."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from execute_ranks import processes
from torch.nn.parallel import DistributedDataParallel

from trainkit import NetworkState, auto_network_hook
from trainkit.collectives import ForestState, Topology, forest_hook, register_backend

PAIR = Topology("pair", list("ab"), list("ab"), [("a", "b", 1), ("b", "a", 1)], unit="Mbit/s")


def _gradient(state: Any, hook: Any, group: Any, value: float, steps: int = 1) -> float:
    model = torch.nn.Linear(16, 1, bias=False)
    ddp = DistributedDataParallel(model, process_group=group)
    ddp.register_comm_hook(state, hook)
    for _ in range(steps):
        model.zero_grad()
        ddp(torch.full((1, 16), value)).sum().backward()
    assert model.weight.grad is not None
    return float(model.weight.grad[0, 0])


def _in_sub_groups(rank: int) -> list[Any]:
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    mine = groups[rank // 2]
    forest, network = ForestState(topology=PAIR, process_group=mine), NetworkState(PAIR, process_group=mine)
    seen: list[Any] = [
        _gradient(forest, forest_hook, mine, rank + 1.0),
        _gradient(network, auto_network_hook, mine, rank + 1.0, steps=4),
        network.plan is not None,
    ]
    everybody = Topology(
        "four", list("abcd"), list("abcd"), [(u, v, 1) for u in "abcd" for v in "abcd" if u != v], unit="Mbit/s"
    )
    for state, hook in ((ForestState(topology=everybody), forest_hook), (NetworkState(), auto_network_hook)):
        try:
            _gradient(state, hook, mine, 1.0)
        except Exception as error:
            seen.append(str(error))
    dist.barrier()
    return seen


def test_each_sub_group_has_its_own_sums_and_another_group_is_refused() -> None:
    for rank, (forest, network, planned, *refused) in processes(_in_sub_groups, 4).items():
        right = 1.5 if rank < 2 else 3.5
        assert (forest, network, planned) == (right, right, True)
        theirs = "[0, 1]" if rank < 2 else "[2, 3]"
        assert len(refused) == 2
        for words in refused:
            assert f"averages over ranks {theirs}, this" in words and "[0, 1, 2, 3]: give both the same" in words


def _adversaries(rank: int, hooked: bool) -> list[float]:
    """A generator and a discriminator, trained in turn, each with a state of its own."""
    torch.manual_seed(0)
    makes = DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.ReLU(), torch.nn.Linear(16, 8))
    )
    judges = DistributedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 1))
    )
    states = [ForestState(topology=PAIR) for _ in range(2)] if hooked else []
    for model, state in zip((makes, judges), states, strict=False):
        model.register_comm_hook(state, forest_hook)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (makes, judges)]
    numbers = torch.Generator().manual_seed(rank)
    for _ in range(6):
        made = makes(torch.randn(8, 4, generator=numbers))
        (judges(made.detach()).mean() - judges(torch.randn(8, 8, generator=numbers)).mean()).backward()
        optimizers[1].step()
        optimizers[1].zero_grad()
        (-judges(made).mean()).backward()  # both models get gradients
        optimizers[0].step()
        for optimizer in optimizers:
            optimizer.zero_grad()
    values = torch.cat([p.detach().flatten() for model in (makes, judges) for p in model.parameters()]).tolist()
    dist.barrier()
    for state in states:
        state.close()
    return values


def test_two_models_of_one_job_each_have_a_state() -> None:
    ours, theirs = processes(_adversaries, 2, True), processes(_adversaries, 2, False)
    assert ours[0] == ours[1]
    assert ours[0] == pytest.approx(theirs[0], abs=1e-5)


def _rss() -> float:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20


def _grows(rank: int, how: str, buckets: int) -> list[float]:
    if how == "backend":
        register_backend(PAIR)
        dist.init_process_group("trainkit")
    state = (
        None if how == "backend" else ForestState(topology=PAIR, fallback="allreduce" if how == "fallback" else "error")
    )
    values, seen = torch.ones(1000), []
    for at in range(buckets + 1):
        if state is not None:
            state.all_reduce(values, average=True).wait()
        elif at % 2:
            dist.all_reduce(values, dist.ReduceOp.AVG)
        else:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        if at in (buckets // 4, buckets):
            seen.append(_rss())
    assert values.tolist() == [1.0] * 1000
    dist.barrier()
    return seen


@pytest.mark.parametrize(
    ("how", "buckets"),
    [
        ("hook", 2000),
        ("backend", 1000),
        *(pytest.param(how, 20_000, marks=pytest.mark.slow) for how in ("hook", "fallback", "backend")),
    ],
)
def test_memory_stays_as_it_is(how: str, buckets: int) -> None:
    for early, late in processes(
        _grows, 2, how, buckets, backend="" if how == "backend" else "gloo", deadline_s=280
    ).values():
        assert late - early < 5, f"{early:.1f} MiB grew to {late:.1f}"
