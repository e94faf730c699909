"""The emulated network: routes as promised, rates as asked, nothing left behind."""

import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from network_lab import CASES, Lab, Routes
from paths import ROOT

from trainkit.collectives import Topology, allreduce_forest, optimum

# all-gather and all-reduce of the ring in rank order over the best schedule's time
RATIOS = {"E1": (7.0, 7.0), "E2": (1.0, 1.75), "E3": (2.0, 8 / 3), "E7": (3.9375, 3.9375)}


@pytest.mark.parametrize("case", RATIOS)
def test_rank_order_ring_has_the_known_distance_from_the_optimum(case: str) -> None:
    topology = CASES[case]()
    ranks = len(topology.compute_nodes)
    ring = Routes(topology).ring_seconds_per_unit() * (ranks - 1) / ranks
    gather = ring / float(optimum(topology).achievable / ranks)
    reduce = 2 * ring / float(allreduce_forest(topology).time_per_byte)
    assert (gather, reduce) == pytest.approx(RATIOS[case])


@pytest.mark.parametrize("case", CASES)
def test_routes_are_widest_shortest_paths(case: str) -> None:
    import networkx

    topology = CASES[case]()
    graph, routes = topology.to_networkx(), Routes(topology)
    for u in topology.compute_nodes:
        for v in topology.compute_nodes:
            if u == v:
                continue
            paths = list(networkx.all_shortest_paths(graph, u, v))
            width = {tuple(p): min(graph.edges[e]["capacity"] for e in pairwise(p)) for p in paths}
            assert width[routes.path(u, v)] == max(width.values())


def test_a_one_way_ring_is_routed_all_the_way_round() -> None:
    ring = Topology("one way", list("abcd"), list("abcd"), [("a", "b", 1), ("b", "c", 1), ("c", "d", 1), ("d", "a", 1)])
    routes = Routes(ring)
    assert routes.path("b", "a") == tuple("bcda")
    assert routes.ring_seconds_per_unit(["a", "d", "c", "b"]) == 3


@pytest.mark.netns
def test_links_have_their_own_rate_each_way_and_count_their_bytes() -> None:
    links = [("a", "s", 20), ("s", "a", 10), ("b", "s", 5), ("s", "b", 20)]
    with Lab(Topology("uneven", list("abs"), list("ab"), links, unit="Mbit/s")) as lab:
        before = lab.bytes()
        rates = lab.goodput(0.5)
        for u, v, rate in links:
            assert rates[u, v] == pytest.approx(0.95 * rate, rel=0.15)
        assert all(count > before[link] for link, count in lab.bytes().items())
        process = lab.popen(
            "a", [sys.executable, "-c", "import os; print(os.environ['GLOO_SOCKET_IFNAME'])"], stdout=-1
        )
        assert process.communicate(timeout=30)[0].strip() == b"node"


@pytest.mark.netns
def test_a_killed_lab_leaves_no_process_and_no_namespace() -> None:
    code = (
        "import sys, time; sys.path.append('tests/support'); from network_lab import *\n"
        "lab = Lab(CASES['E2']()).__enter__()\n"
        "print(lab.popen('0', ['sh', '-c', 'sleep 250 & echo $! ; wait'], stdout=-1).stdout.readline().decode(), flush=True)\n"
        "time.sleep(200)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stdout is not None
    grandchild = int(process.stdout.readline())
    os.kill(process.pid, signal.SIGKILL)
    process.wait(30)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and Path(f"/proc/{grandchild}/ns/net").exists():
        time.sleep(0.05)
    stat = Path(f"/proc/{grandchild}/stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z"
