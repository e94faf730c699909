"""AutoNetworkStrategy with real processes: it plans, carries, compares, plans anew, and every rank ends with equal bits."""

import json
import multiprocessing
import os
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
import torch.distributed as dist
from execute_ranks import processes
from lightning_fabric.plugins.environments import LightningEnvironment
from network_lab import Lab
from torch.nn.parallel import DistributedDataParallel

from trainkit import AutoNetworkStrategy
from trainkit.collectives import ForestState, Topology, fabrics, probe
from trainkit.collectives._probe import placed
from trainkit.integrations._network import NetworkState, auto_network_hook
from trainkit.switchml import SoftwareSwitch


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 1))
        self.seen: list[str | None] = []

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        plan = self.trainer.strategy.network_state.plan  # type: ignore[attr-defined]
        self.seen.append(plan and plan.chosen.name)
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def _train(rank: int, folder: Path, world: int, steps: int, options: dict[str, Any] | None) -> dict[str, Any]:
    """What one rank of a Trainer saw, under a strategy of these options or, without any, its registered name."""
    log = folder / f"said-{rank}"
    with log.open("w") as file:
        os.dup2(file.fileno(), 2)
    pl.seed_everything(0, verbose=False)
    data = torch.utils.data.DataLoader(torch.randn(400, 16), batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu", devices=world, strategy="auto_network" if options is None else AutoNetworkStrategy(**options),
        max_steps=steps, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        plugins=[LightningEnvironment()],
    )  # fmt: skip
    net = Net()
    trainer.fit(net, data)
    state = trainer.strategy.network_state  # type: ignore[attr-defined]
    return {
        "bits": torch.cat([p.detach().flatten() for p in net.parameters()]).view(torch.int32).tolist(),
        "seen": net.seen,
        "plan": state.plan and json.loads(json.dumps(state.plan.as_dict())),
        "compared": [[c.algorithm, c.steps, c.predicted_s, c.measured_s] for c in state.comparisons],
        "said": log.read_text(),
    }


def train(folder: Path, network: Topology, *, world: int = 2, steps: int = 14, **more: Any) -> list[dict[str, Any]]:
    options = {"network": network, "window": 4, **more}
    ended = processes(_train, world, folder, world, steps, options, backend="", deadline_s=240)
    return [ended[rank] for rank in range(world)]


def test_a_schedule_is_chosen_and_compared_with_what_happens(tmp_path: Path) -> None:
    # one slow host on a star: only reducing and broadcasting at once saves its link
    results = train(tmp_path, fabrics.star([1, 4, 4], unit="Mbit/s"), world=3)
    assert all(result["bits"] == results[0]["bits"] for result in results)
    chosen = results[0]["plan"]["chosen"]
    assert chosen in ("native", "tree", "forest")
    # two steps on the ring, then the plan
    assert results[0]["seen"] == [None] * 3 + [chosen] * 11
    assert [row[:2] for row in results[0]["compared"]] == [[chosen, 4]] * 2
    assert [row[2:] for row in results[0]["compared"]] == [row[2:] for row in results[2]["compared"]]
    assert results[0]["plan"]["buckets"] == [4 * (16 * 64 + 64 + 64 + 1)]


def test_a_switch_is_chosen_and_carries_the_gradients(tmp_path: Path) -> None:
    star = fabrics.star([1, 1, 1], unit="Mbit/s")
    with SoftwareSwitch() as switch:
        results = train(tmp_path, star, world=3, steps=8, switch=[switch.address, star.switches[0]])
        taken = switch.counters()
    assert results[0]["plan"]["chosen"] == "switchml"
    assert results[0]["seen"][3:] == ["switchml"] * 5
    assert all(result["bits"] == results[0]["bits"] for result in results)
    assert [row[0] for row in results[0]["compared"]] == ["switchml"]
    assert taken["chunks"] > 0


def test_reordered_ring_runs_in_a_group_of_its_own(tmp_path: Path) -> None:
    fast = [("a", "b"), ("b", "c"), ("c", "a")]
    links = [(u, v, 100) for u, v in fast] + [(v, u, 1) for u, v in fast]
    # gloo's ring flows from rank r to r - 1: the slow way
    results = train(tmp_path, Topology("one way round", list("abc"), list("abc"), links, unit="Mbit/s"), world=3)
    assert all(result["bits"] == results[0]["bits"] for result in results)
    assert results[0]["plan"]["chosen"] == "reordered ring"
    assert results[0]["plan"]["algorithms"]["reordered ring"]["order"] in (
        ["a", "c", "b"],
        ["c", "b", "a"],
        ["b", "a", "c"],
    )


def test_on_one_host_there_is_nothing_to_plan_and_training_goes_on(tmp_path: Path) -> None:
    results = processes(_train, 2, tmp_path, 2, 5, None, backend="", deadline_s=240)
    assert results[0]["bits"] == results[1]["bits"]
    assert results[0]["plan"] is None
    assert "all 2 ranks are on host" in results[0]["said"]


def test_drift_has_the_network_probed_anew(tmp_path: Path) -> None:
    # no two windows take equal times: every third look is drift; here the probe then finds one host, the plan stays
    results = train(tmp_path, fabrics.star([1, 4], unit="Mbit/s"), steps=20, drift=1e-9)
    assert results[0]["bits"] == results[1]["bits"]
    assert "the network drifted" in results[0]["said"]
    assert "no network plan: all 2 ranks are on host" in results[0]["said"]
    assert results[0]["plan"]["network"].startswith("star")


def _trained(state: NetworkState, rank: int, steps: int) -> torch.Tensor:
    """Parameters after some steps of DDP that differ from rank to rank in nothing but the data."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Tanh(), torch.nn.Linear(128, 64))
    ddp = DistributedDataParallel(net)
    state.connect()
    ddp.register_comm_hook(state, auto_network_hook)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    data = torch.Generator().manual_seed(rank)
    for _ in range(steps):
        batch = torch.randn(8, 64, generator=data)
        optimizer.zero_grad()
        (ddp(batch) - batch).square().mean().backward()
        optimizer.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def _two_runs(rank: int) -> tuple[list[float], list[float], bool]:
    state: NetworkState = pickle.loads(pickle.dumps(NetworkState(fabrics.star([1, 4, 4], unit="Mbit/s"))))
    first = _trained(state, rank, 5)
    state.close()
    second = _trained(state, rank, 2)  # joins anew
    assert state.plan is not None
    assert isinstance(state._backend, ForestState)
    sent = state._backend.counters()["sent_bytes"]
    state.close()
    dist.barrier()
    return first.tolist(), second.tolist(), sent > 0 and state._backend.runner is None


def test_a_closed_state_can_be_used_again() -> None:
    one, *others = processes(_two_runs, 3).values()
    assert all(other == one for other in others)
    assert one[2]


def _refused(rank: int) -> list[str]:
    said = []
    for call in (
        lambda: NetworkState(fabrics.star([1, 1, 1], unit="Mbit/s")).connect(),
        lambda: probe(interface="lo" if rank == 0 else "nowhere"),
    ):
        with pytest.raises(ValueError) as told:
            call()
        said.append(str(told.value))
    return said


def test_every_rank_is_told_what_one_cannot_do() -> None:
    for size, interface in processes(_refused, 2).values():
        assert "needs one compute node a rank: star 3 has 3, the job 2 ranks" in size
        assert "interface must be a network interface with an address, got 'nowhere'" in interface


def _alone(rank: int) -> bool:
    state = NetworkState()
    _trained(state, rank, 4)
    return state.plan is None


def test_one_rank_has_nothing_to_plan_and_trains() -> None:
    assert processes(_alone, 1) == {0: True}


def seats(*addresses: str) -> list[dict[str, str]]:
    return [{"address": address, "name": "node"} for address in addresses]


def test_a_job_in_another_order_than_the_probe_finds_its_places() -> None:
    names = ["a.0", "a.1", "b.0", "b.1"]
    links = [link for name in names for link in ((name, name[0], 9), (name[0], name, 9))]
    links += [("a", "b", 1), ("b", "a", 1)]
    devices = {host: {"address": f"10.0.0.{number}", "ranks": 2} for number, host in enumerate("ab")}
    network = Topology("probed", [*names, "a", "b"], names, links, unit="Mbit/s", devices=devices)
    in_turn = placed(network, seats("10.0.0.1", "10.0.0.0", "10.0.0.1", "10.0.0.0"))
    assert in_turn.compute_nodes == ("b.0", "a.0", "b.1", "a.1")
    assert placed(network, seats("10.0.0.9", "10.0.0.0", "10.0.0.1", "10.0.0.0")) == network
    with pytest.raises(ValueError, match="host 'a' has 2 ranks there and 3 in this job"):
        placed(network, seats("10.0.0.0", "10.0.0.0", "10.0.0.1", "10.0.0.0"))


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"timeout_s": -1.0}, "timeout_s must be seconds above 0, got -1"),
        ({"fallback": "ring"}, 'fallback must be "error" or "allreduce", got \'ring\''),
        ({"switch": "10.0.0.1:48864"}, "its node in the network"),
        ({"window": 0}, "window is a number of steps of at least 1, got 0"),
        ({"drift": float("nan")}, "drift is a part above 0"),
    ],
)
def test_options_are_checked_before_training_starts(options: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        NetworkState(**options)


def _probed_and_trained(rank: int, size: int, address: str, file: Path, results: Any) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "node"
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://{address}:29500", rank=rank, world_size=size)
    network = probe(interface="node", measure_s=0.1)
    if rank == 0:
        # as if the job had come in another order
        replace(network, compute_nodes=sorted(network.compute_nodes)).save(file)
    dist.barrier()
    state = NetworkState(file, interface="node")
    parameters = _trained(state, rank, 6)
    assert state.plan is not None
    assert state.network is not None
    in_order = state.network.compute_nodes == network.compute_nodes
    results.put((rank, parameters.tolist(), state.plan.chosen.name, in_order))
    results.close()
    results.join_thread()
    state.close()
    dist.barrier()


@pytest.mark.netns
def test_several_ranks_a_host_are_probed_planned_and_trained(tmp_path: Path) -> None:
    where = "0101"  # ranks dealt over two hosts in turn
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    with Lab(fabrics.star([5, 10], unit="Mbit/s")) as lab:
        ranks = [
            context.Process(
                target=_probed_and_trained,
                args=(rank, len(where), lab.address("0"), tmp_path / "network.json", results),
                daemon=True,
            )
            for rank in range(len(where))
        ]
        try:
            for node, process in zip(where, ranks, strict=True):
                lab.inside(node, process.start)
            told = sorted(results.get(timeout=60) for _ in where)
            for process in ranks:
                process.join(30)
        finally:
            for process in ranks:
                process.kill()
    network = Topology.load(tmp_path / "network.json")
    near = {u: v for u, v, _ in network.links if u in network.compute_nodes}
    first, second, third, fourth = (near[node] for node in network.compute_nodes)
    assert first == second != third == fourth
    assert all(row[3] for row in told)
    # every rank's ring hop would leave its host; a schedule sends a host's gradients out once
    assert {row[2] for row in told} & {"native", "forest", "tree"}
    assert len({row[2] for row in told}) == 1
    assert all(row[1] == told[0][1] for row in told)
