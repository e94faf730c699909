"""The probe on real TCP over emulated networks."""

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest
from network_lab import CASES, Lab, groups, probed, racks

from trainkit.collectives import Topology
from trainkit.collectives.fabrics import star

pytestmark = pytest.mark.netns


@pytest.mark.parametrize("each", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_two_racks_are_found_from_an_interleaved_order(each: int) -> None:
    interleaved = [f"h{rack}_{i}" for i in range(each) for rack in range(2)]
    network = probed(racks((each, each), 20, (5, 5)), interleaved, hops=False)
    assert groups(network) == [[f"h{i}" for i in range(rack, 2 * each, 2)] for rack in range(2)]
    rates = {(u, v): float(rate) for u, v, rate in network.links}
    assert rates["rack0", "core"] == pytest.approx(5, rel=0.15)
    assert all(rates[f"h{i}", f"rack{i % 2}"] == pytest.approx(20, rel=0.15) for i in range(2 * each))


@pytest.mark.slow
def test_one_flat_switch_gives_one_group() -> None:
    network = probed(star(["10"] * 6, unit="Mbit/s"), [str(i) for i in range(6)])
    assert network.switches == ("switch",)
    assert all(float(rate) == pytest.approx(10, rel=0.15) for _, _, rate in network.links)


@pytest.mark.slow
def test_hop_counts_show_racks_whose_uplinks_hold_nothing_back() -> None:
    topology = racks((2, 2, 2), 10, (20, 20, 20))
    network = probed(topology, list(topology.compute_nodes), measure_s=0.2)
    assert groups(network) == [["h0", "h1"], ["h2", "h3"], ["h4", "h5"]]
    assert not network.confidence["links"]["rack0->core"]["limit"]


RANKS = """
import os, sys, torch.distributed as dist
from datetime import timedelta
from trainkit.collectives import probe
dist.init_process_group("gloo", timeout=timedelta(seconds=120))
network = probe(measure_s=0.1)
everyone = [None] * dist.get_world_size()
dist.all_gather_object(everyone, network.to_dict())
assert all(one == everyone[0] for one in everyone)
if dist.get_rank() == 0:
    network.save(sys.argv[1])
dist.destroy_process_group()
"""


def test_ranks_of_a_process_group_are_compute_nodes_in_their_order(tmp_path: Path) -> None:
    out = tmp_path / "network.json"
    with Lab(star([10, 20], unit="Mbit/s")) as lab:
        where = ["0", "1", "0"]  # ranks 0 and 2 share a host
        environment = {
            "MASTER_ADDR": lab.address("0"),
            "MASTER_PORT": "29500",
            "WORLD_SIZE": "3",
            "OMP_NUM_THREADS": "1",
        }
        ranks = [
            lab.popen(
                node,
                [sys.executable, "-P", "-c", RANKS, str(out)],
                env={**environment, "RANK": str(rank), "PATH": "/usr/bin"},
            )
            for rank, node in enumerate(where)
        ]
        assert [rank.wait(120) for rank in ranks] == [0, 0, 0]
    network = Topology.load(out)
    near = {u: v for u, v, _ in network.links if u in network.compute_nodes}
    first, second, third = network.compute_nodes
    assert near[first] == near[third] != near[second]
    rates = {(u, v): float(rate) for u, v, rate in network.links}
    assert rates[near[first], "switch"] == pytest.approx(10, rel=0.15)
    assert rates[first, near[first]] > 100


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_sixteen_hosts_in_uneven_racks_with_a_slow_one(seed: int, tmp_path: Path) -> None:
    topology = CASES["16"]()
    order = random.Random(seed).sample(topology.compute_nodes, 16)
    out = tmp_path / "network.json"
    with Lab(topology) as lab:
        words = [
            sys.executable,
            "-m",
            "trainkit",
            "probe",
            "--ignore-hops",
            "--hosts",
            "16",
            "--out",
            str(out),
            "--json",
        ]
        words += ["--rendezvous", f"{lab.address(order[0])}:29400", "--draw", str(out.with_suffix(".svg"))]
        hosts = [
            lab.popen(node, [*words, "--rank", str(rank), "--name", node], stdout=subprocess.PIPE)
            for rank, node in enumerate(order)
        ]
        said = [host.communicate(timeout=280)[0] for host in hosts]
    assert json.loads(said[0]) == json.loads(out.read_text())
    assert not any(said[1:])
    assert out.with_suffix(".svg").stat().st_size > 1000
    network = Topology.load(out)
    assert groups(network) == groups(topology)
    true = {u: (v, float(rate)) for u, v, rate in topology.links if u != "core"}
    for u, v, rate in network.links:
        if u in network.compute_nodes:
            assert float(rate) == pytest.approx(true[u][1], rel=0.15)
        elif v == "core":
            below = next(a for a, b, _ in network.links if b == u and a in network.compute_nodes)
            assert float(rate) == pytest.approx(true[true[below][0]][1], rel=0.15)
