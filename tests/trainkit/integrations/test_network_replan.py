"""What is planned for and planned again: every rank goes on with equal bits, and what was left is let go."""

import pytest
import torch
import torch.distributed as dist
from execute_ranks import processes
from torch.nn.parallel import DistributedDataParallel

from trainkit._planner import plan_network
from trainkit.collectives import Topology, fabrics
from trainkit.integrations._network import NetworkState, auto_network_hook


def one_way_round(order: str) -> Topology:
    """A ring that is fast in one direction only; gloo's runs from rank r to r - 1."""
    fast = list(zip(order, order[1:] + order[:1], strict=True))
    links = [(u, v, 100) for u, v in fast] + [(v, u, 1) for u, v in fast]
    return Topology(order, list("abc"), list("abc"), links, unit="Mbit/s")


NETWORKS = {
    "reordered ring": one_way_round("abc"),
    "ring": one_way_round("acb"),
    "scheduled": fabrics.star([1, 4, 4], unit="Mbit/s"),
}


def _planned_again(rank: int) -> tuple[list[str], list[int], list[float]]:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(torch.nn.Linear(64, 64))
    state = NetworkState(NETWORKS["reordered ring"], fallback="allreduce")
    state.connect()
    ddp.register_comm_hook(state, auto_network_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(rank)
    ways, groups = [], []
    for step in range(14):
        batch = torch.randn(8, 64, generator=data)
        optimizer.zero_grad()
        (ddp(batch) - batch).square().mean().backward()
        optimizer.step()
        if step in (4, 6, 8, 10, 12):
            network = list(NETWORKS.values())[(step // 2 - 1) % 3]
            state._replan([(4 * 64 * 65, 4)], network)
        ways.append("planning" if state.plan is None else state.plan.chosen.name)
        groups.append(len(dist.distributed_c10d._world.pg_map))
    state.close()
    dist.barrier()
    return ways, groups, torch.cat([p.detach().flatten() for p in ddp.parameters()]).tolist()


def test_groups_of_plans_that_were_left_are_destroyed() -> None:
    told = processes(_planned_again, 3)
    ways, groups, _ = told[0]
    assert ways == [
        *["planning"] * 2, *["reordered ring"] * 2, *["ring"] * 2, *["forest"] * 2,
        *["reordered ring"] * 2, *["ring"] * 2, *["forest"] * 2,
    ]  # fmt: skip
    # the world, and a ring in another order
    assert groups == [1 + (way == "reordered ring") for way in ways]
    assert all(other == told[0] for other in told.values())


class Mixed(torch.nn.Module):
    """Half of it fp32, half bf16: DDP gives each type buckets of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64, dtype=torch.bfloat16)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return self.narrow(torch.tanh(self.wide(batch)).bfloat16()).float()


def _mixed(rank: int) -> tuple[tuple[int, ...], float, list[float]]:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(Mixed())
    star = NETWORKS["scheduled"]
    state = NetworkState(star)
    state.connect()
    ddp.register_comm_hook(state, auto_network_hook)
    data = torch.Generator().manual_seed(rank)
    for _ in range(4):
        ddp.zero_grad()
        batch = torch.randn(8, 64, generator=data)
        (ddp(batch) - batch).square().mean().backward()
    assert state.plan is not None
    ring = next(way for way in state.plan.algorithms if way.name == "ring")
    gradients = torch.cat([p.grad.float().flatten() for p in ddp.parameters() if p.grad is not None]).tolist()
    state.close()
    dist.barrier()
    return tuple(sorted(state.plan.buckets)), ring.step_s, gradients


def test_buckets_are_planned_for_by_their_own_bytes() -> None:
    one, *others = processes(_mixed, 3).values()
    assert one[0] == (2 * 64 * 65, 4 * 64 * 65)
    # 1 Mbit/s to and from the slow host, 4 hops in a row of two links and 0.1 ms for each bucket
    assert one[1] == pytest.approx(6 * 64 * 65 * 8e-6 * 4 / 3 + 2 * 4e-4, rel=1e-3)
    assert all(other[2] == one[2] for other in others)


def _trained(state: NetworkState, rank: int, steps: int) -> list[float]:
    torch.manual_seed(0)
    ddp = DistributedDataParallel(torch.nn.Linear(64, 64))
    state.connect()
    ddp.register_comm_hook(state, auto_network_hook)
    data = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        batch = torch.randn(8, 64, generator=data)
        (ddp(batch) - batch).square().mean().backward()
    dist.barrier()
    return torch.cat([p.grad.flatten() for p in ddp.parameters() if p.grad is not None]).tolist()


def _files_differ(rank: int) -> tuple[str, list[str], list[float]]:
    mine = {0: NETWORKS["reordered ring"], 1: fabrics.star([1] * 4, unit="Mbit/s"), 2: None}[rank]
    state = NetworkState(mine)
    gradients = _trained(state, rank, 4)
    assert state.plan is not None
    assert state.network is not None
    return state.plan.chosen.name, list(state.network.compute_nodes), gradients


def test_rank_0s_network_is_everyones() -> None:
    one, *others = processes(_files_differ, 3).values()
    assert one[:2] == ("reordered ring", ["a", "b", "c"])
    assert all(other == one for other in others)


def star_of(hub: str, unit: str | None = "Mbit/s") -> Topology:
    links = [link for host in "ab" for link in ((host, hub, 9), (hub, host, 9))]
    return Topology(hub, ["a", "b", hub], ["a", "b"], links, unit=unit)


def _no_better(rank: int) -> tuple[list[tuple[str, list[str]]], list[float]]:
    state = NetworkState(star_of("known"), switch=("127.0.0.1:1", "known"))
    state.connect()
    state.plan = plan_network(star_of("known"), [1 << 20])
    seen = []
    # one that nobody can plan for, then one as a probe would find it
    for network in (star_of("known", unit=None), star_of("found")):
        state._replan([(1 << 20, 4)], network)
        seen.append((state.plan.topology.name, sorted(way.name for way in state.plan.algorithms)))
    return seen, _trained(state, rank, 2)


def test_training_goes_on_where_no_better_plan_is_to_be_had() -> None:
    one, other = processes(_no_better, 2).values()
    ways = ["forest", "native", "ring", "tree"]
    assert one[0] == [("known", ways), ("found", ways)]
    assert other == one
