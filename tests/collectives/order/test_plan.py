"""Plans of ranks: placing hosts, files for launchers, costs from a network, `trainkit order`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from order_matrices import datacenter
from paths import DATA

from trainkit.cli._main import main
from trainkit.collectives import Topology
from trainkit.collectives.fabrics import mesh
from trainkit.collectives.order import (
    Arrival,
    OrderError,
    RankPlan,
    hosts_of,
    launcher_text,
    network_costs,
    racks,
    ring_load,
)

CASES = {case["id"]: case for case in json.loads((DATA / "order_cases.json").read_text())}


def two_racks(hosts: list[str] | None = None) -> Topology:
    """Two racks of four hosts (100 Mbit/s), uplinks a quarter; interleaved rank order by default."""
    names = [f"h{rack}_{at}" for at in range(4) for rack in range(2)] if hosts is None else hosts
    pairs = [(name, f"rack{name[1]}", 100) for name in names] + [("rack0", "core", 25), ("rack1", "core", 25)]
    links = [link for u, v, rate in pairs for link in ((u, v, rate), (v, u, rate))]
    latency = {(u, v): 1e-5 for u, v, _ in links}
    return Topology("two racks", [*names, "rack0", "rack1", "core"], names, links, unit="Mbit/s", latency=latency)


def arrivals(*names: str) -> list[Arrival]:
    return [Arrival((name,)) for name in names]


def test_a_plan_gives_ranks() -> None:
    expected = CASES["B13"]["expected"]
    ranks = RankPlan(["c", "a", "b"]).place(arrivals("a", "b", "c"))
    assert dict(zip("abc", ranks, strict=True)) == expected


@given(st.permutations(range(8)), st.sets(st.integers(0, 7), min_size=1))
def test_who_is_missing_does_not_change_the_order(order: list[int], there: set[int]) -> None:
    plan = RankPlan([f"node{host}" for host in order])
    present = sorted(there)
    ranks = plan.place(arrivals(*(f"node{host}" for host in present)))
    by_rank = [present[ranks.index(rank)] for rank in range(len(present))]
    assert by_rank == [host for host in order if host in there]


def test_strangers_come_beside_their_rack_or_last() -> None:
    plan = RankPlan(["a", "b", "c"], racks={"a": "r0", "b": "r0", "c": "r1", "d": "r0"})
    arrived = [*arrivals("node10", "d", "c", "b", "a", "node9"), Arrival(("e",), "r1"), Arrival(("f",), "r7")]
    by_name = dict(zip(["node10", "d", "c", "b", "a", "node9", "e", "f"], plan.place(arrived), strict=True))
    assert sorted(by_name, key=by_name.__getitem__) == ["a", "b", "d", "c", "e", "f", "node9", "node10"]
    # the rack's place is kept although its planned hosts are gone
    assert plan.place(arrivals("c", "d")) == [1, 0]


def test_names_of_hosts() -> None:
    plan = RankPlan(["node7.a.org", "10.0.0.8", "Node9"], addresses={"Node9": ["10.0.0.9", "fe80::9"]})
    for names, position in (
        (("node7",), 0),
        (("NODE7.A.ORG",), 0),
        (("10.0.0.8",), 1),
        (("10",), None),
        (("fe80::9",), 2),
        (("node9",), 2),
        (("unheard-of", "10.0.0.9"), 2),
    ):
        assert plan.position(Arrival(names)) == position
    # a label that two hosts share names neither
    assert RankPlan(["n.a", "n.b"]).position(Arrival(("n",))) is None


def test_two_processes_of_one_host_stay_together() -> None:
    assert RankPlan(["b", "a"]).place(arrivals("a", "a", "b", "b")) == [2, 3, 0, 1]


def test_a_plan_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = RankPlan(("b", "a"), racks={"a": "r"}, addresses={"b": ["10.0.0.1"]}, about={"algorithm": "ring"})
    (tmp_path / "plan.json").write_text(plan.text())
    assert RankPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("{", "is not JSON"),
        ("[]", "must be a plan of ranks of version 1, got 'list'"),
        ('{"version": 2, "hosts": ["a"]}', "of version 1, got 2"),
        ('{"version": 1}', "no list of hosts"),
        ('{"version": 1, "hosts": "ab"}', "no list of hosts"),
        ('{"version": 1, "hosts": ["a"], "rank": 1}', "unknown key 'rank'"),
        ('{"version": 1, "hosts": []}', "at least one host"),
        ('{"version": 1, "hosts": ["a", "a"]}', "'a' appears 2 times"),
        ('{"version": 1, "hosts": ["a b"]}', "without blanks, got 'a b'"),
        ('{"version": 1, "hosts": ["a"], "racks": []}', "racks of a plan must be an object"),
        ('{"version": 1, "hosts": ["a"], "racks": {"a": 1}}', "racks of a plan must be"),
        ('{"version": 1, "hosts": ["a"], "addresses": {"b": []}}', "addresses of a plan must be"),
        ('{"version": 1, "hosts": ["a"], "addresses": {"a": "x"}}', "addresses of a plan must be"),
    ],
)
def test_bad_plans(text: str, what: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(OrderError, match=what):
        RankPlan.load(tmp_path / "plan.json")


def test_launchers() -> None:
    plan = RankPlan(["n2", "n10"])
    assert launcher_text(plan, "node-rank") == "n2 0\nn10 1\n"
    rankfile = "rank 0=n2 slot=0\nrank 1=n2 slot=1\nrank 2=n10 slot=0\nrank 3=n10 slot=1\n"
    assert launcher_text(plan, "rankfile", 2) == rankfile
    assert launcher_text(plan, "slurm", 2) == "n2\nn2\nn10\nn10\n"
    assert json.loads(launcher_text(plan, "kubernetes"))["data"] == {"n2": "0", "n10": "1"}
    assert json.loads(launcher_text(plan, "torchrun"))["hosts"] == ["n2", "n10"]
    for launcher, slots, what in (("pbs", 1, "got 'pbs'"), ("slurm", 0, "at least 1, got 0")):
        with pytest.raises(OrderError, match=what):
            launcher_text(plan, launcher, slots)
    with pytest.raises(OrderError, match="ConfigMap's keys"):
        launcher_text(RankPlan(["fe80::1"]), "kubernetes")


def test_costs_of_a_network() -> None:
    network = two_racks()
    cost, latency = network_costs(network, 10**6)
    assert cost[0, 2] == pytest.approx(8e6 / 100e6)  # h0_0 to h0_1
    assert cost[0, 1] == pytest.approx(8e6 / 25e6)  # h0_0 to h1_0
    assert (latency[0, 2], latency[0, 1]) == (pytest.approx(2e-5), pytest.approx(4e-5))
    assert (np.diag(cost) == 0).all()
    assert racks(network)["h1_3"] == "rack1"


def test_hops_that_share_an_uplink() -> None:
    network = two_racks([f"h{rack}_{at}" for rack in range(2) for at in range(4)])
    orders = ([0, 1, 2, 3, 4, 5, 6, 7], [0, 4, 1, 5, 2, 6, 3, 7], [3, 6, 0, 5, 7, 1, 2, 4])
    loads = [ring_load(network, order) for order in orders]
    assert [load / loads[0] for load in loads] == CASES["B05"]["expected"]["ratio"]


def test_costs_without_switches_go_through_hosts() -> None:
    cost, _ = network_costs(mesh((3, 3), "8", unit="Mbit/s"), 10**6)
    assert cost[~np.eye(9, dtype=bool)] == pytest.approx(1.0)


def test_ranks_of_one_host_are_one_host() -> None:
    links: list[tuple[str, str, Any]] = []
    for host in "ab":
        for end in (f"{host}.0", f"{host}.1"):
            links += [(end, host, 800), (host, end, 800)]
        links += [(host, "tor", 8), ("tor", host, 8)]
    nodes = ["a.0", "b.0", "a.1", "b.1"]
    devices = {"a": {"ranks": 2, "address": "10.0.0.1"}, "b": {"ranks": 2, "address": "10.0.0.2"}}
    network = Topology("two hosts", [*nodes, "a", "b", "tor"], nodes, links, unit="Mbit/s", devices=devices)
    assert hosts_of(network) == {"a": ["a.0", "a.1"], "b": ["b.0", "b.1"]}
    assert network_costs(network, 10**6)[0].tolist() == [[0, 1], [1, 0]]
    assert racks(network) == {"a": "tor", "b": "tor"}
    assert ring_load(network, [1, 0]) > 0


def test_costs_need_a_unit() -> None:
    with pytest.raises(OrderError, match="needs a unit"):
        network_costs(mesh((2, 2)), 1)
    with pytest.raises(OrderError, match="at least 1 byte"):
        network_costs(two_racks(), 0)


def test_order_of_a_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "network.json", tmp_path / "rank_order.json"
    two_racks().save(source)
    words = ["order", str(source), "--bytes", "8MiB", "--write", "torchrun", "--out", str(out)]
    assert main([*words, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["changed"] and said["optimal"]
    assert said["given_seconds"] == pytest.approx(4 * said["seconds"])
    # 2 (N - 1) / N of the message crosses the uplink once: B08
    assert said["seconds"] * 25e6 / 8 == pytest.approx(CASES["B08"]["expected"]["N8_M8MiB_per_crossing_bytes"])
    plan = RankPlan.load(out)
    along = [plan.racks[host] for host in plan.hosts]
    assert sum(one != other for one, other in zip(along, along[1:] + along[:1], strict=True)) == 2
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "proved optimal" in text
    assert f"--rdzv-backend trainkit --rdzv-conf plan={out}" in text


@pytest.mark.parametrize("kind", ["npy", "csv", "named.csv", "json", "named.json"])
def test_order_of_a_matrix(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cost, _ = datacenter(8, rack=4, pod=8)
    names = [f"n{at}" for at in range(8)]
    source, hosts = tmp_path / f"cost.{kind}", tmp_path / "hosts"
    hosts.write_text("\n".join(names))
    table = "\n".join(",".join(map(str, row)) for row in cost.tolist())
    if kind == "npy":
        np.save(source, cost)
    elif kind.endswith("csv"):
        source.write_text((",".join(names) + "\n" if kind == "named.csv" else "") + table)
    else:
        data = {"hosts": names, "cost": cost.tolist()} if kind == "named.json" else cost.tolist()
        source.write_text(json.dumps(data))
    given_names = [] if kind.startswith("named") else ["--hosts", str(hosts)]
    assert main(["order", str(source), *given_names, "--write", "slurm"]) == 0
    assert sorted(capsys.readouterr().out.split()) == names


@pytest.mark.parametrize(
    ("text", "words", "what"),
    [
        ("[[0, 1], [1]]", [], "cost must be a matrix of numbers"),
        ("[[0, 1], [-1, 0]]", [], "cost must be at least 0"),
        ("[[0, 1], [1, 0]]", ["--algorithm", "star"], "got 'star'"),
        ("[[0, 1], [1, 0]]", ["--write", "pbs"], "got 'pbs'"),
        ("[[0, 1], [1, 0]]", ["--out", "x"], "--out needs --write"),
        ("[[0, 1], [1, 0]]", ["--bytes", "1KiB..1MiB"], "--bytes is one size"),
        ('{"cost": [[0, 1], [1, 0]], "names": []}', [], "unknown key 'names'"),
        ('{"cost": [[0, 1], [1, 0]], "hosts": ["a"]}', [], "2 rows, got 1 names"),
        ('{"name": "x"}', [], "key 'nodes' is missing"),
        ("{", [], "is not JSON"),
        ("3", [], "cost must be square"),
    ],
)
def test_refused_input_is_one_line(
    text: str, words: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cost.json").write_text(text)
    assert main(["order", str(tmp_path / "cost.json"), *words]) == 2
    said = capsys.readouterr().err
    assert what in said
    assert said.count("\n") == 1
