"""The planner's predictions: exact where the model is, ranked as the networks' own arithmetic says."""

import functools
import json
from pathlib import Path

import pytest
from paths import DATA

from trainkit._planner import OVERHEAD_S, Algorithm, NetworkPlan, plan_network
from trainkit.cli import main
from trainkit.collectives import Topology, fabrics
from trainkit.collectives._probe._devices import inside
from trainkit.collectives.trees import ring_time

MIB = 2**20
BUCKETS = [MIB, 25 * MIB, 25 * MIB]


def case(name: str) -> Topology:
    every = json.loads((DATA / "forest_cases.json").read_text())
    found = next(case for case in every if case["name"].startswith(name))
    return Topology.from_dict(
        {key: found[key] for key in ("name", "nodes", "compute_nodes", "links")} | {"unit": "Mbit/s"}
    )


@functools.cache
def planned(name: str) -> NetworkPlan:
    return plan_network(case(name), BUCKETS)


def racks(order: str) -> Topology:
    """Two racks of four hosts at 100, uplinks of 25; the hosts named in `order`."""
    links = [(f"{rack}{i}", f"rack-{rack}", 100) for rack in "ab" for i in range(4)]
    links += [("rack-a", "core", 25), ("rack-b", "core", 25)]
    both = [link for u, v, rate in links for link in ((u, v, rate), (v, u, rate))]
    hosts = [order[at : at + 2] for at in range(0, 16, 2)]
    return Topology("racks", [*hosts, "rack-a", "rack-b", "core"], hosts, both, unit="Mbit/s")


@pytest.mark.parametrize(
    ("name", "gain"),
    [("emu_E1", 6.5), ("emu_E3", 4.0), ("emu_E7", 3.2), ("star8_one_slow", 1.7)],
)
def test_trees_are_chosen_where_the_ring_wastes_links(name: str, gain: float) -> None:
    plan = planned(name)
    by_name = {algorithm.name: algorithm for algorithm in plan.algorithms}
    assert plan.chosen.name in ("forest", "native")
    assert by_name["ring"].step_s / plan.chosen.step_s >= gain
    assert plan.bound_s <= plan.chosen.step_s <= 1.25 * plan.bound_s
    assert [algorithm.step_s for algorithm in plan.algorithms] == sorted(
        algorithm.step_s for algorithm in plan.algorithms
    )
    assert plan.chosen.schedule is not None
    plan.chosen.schedule.verify()


def test_only_native_helps_where_one_host_is_slow() -> None:
    by_name = {algorithm.name: algorithm for algorithm in planned("star8_one_slow").algorithms}
    assert by_name["native"].step_s < by_name["forest"].step_s


def test_ring_takes_its_bytes_and_its_hops() -> None:
    star = fabrics.star([100] * 4, unit="Mbit/s")
    plan = plan_network(star, [MIB])
    ring = next(algorithm for algorithm in plan.algorithms if algorithm.name == "ring")
    assert ring.step_s == pytest.approx(MIB * 8e-6 * float(ring_time(star, "allreduce")) + 6 * OVERHEAD_S)


def test_interleaved_racks_are_put_in_order() -> None:
    plan = plan_network(racks("a0b0a1b1a2b2a3b3"), BUCKETS)
    by_name = {algorithm.name: algorithm for algorithm in plan.algorithms}
    assert by_name["ring"].step_s / by_name["reordered ring"].step_s == pytest.approx(4, rel=0.02)
    order = by_name["reordered ring"].order
    assert order is not None
    crossings = sum(a[0] != b[0] for a, b in zip(order, [*order[1:], order[0]], strict=True))
    assert crossings == 2


def test_a_good_order_is_left_alone() -> None:
    assert "reordered ring" not in {
        algorithm.name for algorithm in plan_network(racks("a0a1a2a3b0b1b2b3"), BUCKETS).algorithms
    }


def test_ring_stays_where_nothing_beats_it() -> None:
    pair = Topology("pair", list("ab"), list("ab"), [("a", "b", 100), ("b", "a", 100)], unit="GB/s")
    assert plan_network(pair, [256 * MIB]).chosen.name == "ring"


def test_two_gpus_stay_with_nccl() -> None:
    # what the driver says of two H200: 18 NVLinks, and a slot each
    names, links = inside(
        "host", 2, {"topology": "\tGPU0\tGPU1\nGPU0\t X \tNV18\nGPU1\tNV18\t X \n", "nvlink": 26562}, None
    )
    host = Topology("two GPUs", [*names, "host"], names, links, unit="Mbit/s")
    for nbytes in (MIB, 25 * MIB, 256 * MIB):
        assert plan_network(host, [nbytes], backend="nccl").chosen.name == "ring"
    # as measured on two H100: 0.87 to 0.89 ms a step in 4 buckets
    plan = plan_network(host, [117_497_856 // 4] * 4, backend="nccl")
    assert plan.chosen.step_s == pytest.approx(0.88e-3, rel=0.05)
    # a thin link between hosts is worth the groups of a schedule
    plan = plan_network(case("emu_E1"), [25 * MIB], backend="nccl")
    assert plan.chosen.name in ("forest", "native")


def test_a_switch_that_adds_wins_on_a_star() -> None:
    star = fabrics.star([100] * 8, unit="Mbit/s")
    hub = star.switches[0]
    plan = plan_network(star, BUCKETS, switch=hub)
    assert plan.chosen.name == "switchml"
    assert plan.chosen.step_s == pytest.approx(sum(BUCKETS) * 8e-8, rel=0.01)


def test_a_switch_is_sent_int32_whatever_the_gradients_are() -> None:
    star = fabrics.star([100] * 3, unit="Mbit/s")

    def algorithms(itemsizes: int | list[int]) -> dict[str, Algorithm]:
        plan = plan_network(star, [MIB, MIB], itemsizes=itemsizes, switch=star.switches[0], order_seconds=0.1)
        return {algorithm.name: algorithm for algorithm in plan.algorithms}

    wide, half, mixed = algorithms(4), algorithms(2), algorithms([4, 2])
    assert half["switchml"].step_s == pytest.approx(2 * wide["switchml"].step_s, rel=0.01)
    assert mixed["switchml"].seconds == (wide["switchml"].seconds[0], half["switchml"].seconds[0])
    assert half["ring"].seconds == wide["ring"].seconds
    # worth it for fp32 only
    assert wide["switchml"].step_s < wide["native"].step_s < half["switchml"].step_s


@pytest.mark.parametrize("itemsizes", [0, [4, 4], [4, 0, 4]])
def test_sizes_of_gradients_are_checked(itemsizes: int | list[int]) -> None:
    with pytest.raises(ValueError, match="itemsizes are the bytes of a gradient"):
        plan_network(fabrics.star([1, 1], unit="GB/s"), BUCKETS, itemsizes=itemsizes)


@pytest.mark.parametrize("buckets", [[], [0]])
def test_buckets_are_checked(buckets: list[int]) -> None:
    with pytest.raises(ValueError, match="buckets are the bytes"):
        plan_network(fabrics.star([1, 1], unit="GB/s"), buckets)


def test_unit_and_switch_are_checked() -> None:
    with pytest.raises(ValueError, match="unit"):
        plan_network(fabrics.star([1, 1]), [MIB])
    with pytest.raises(ValueError, match="'nowhere'"):
        plan_network(fabrics.star([1, 1], unit="GB/s"), [MIB], switch="nowhere")


def test_cli_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "network.json"
    racks("a0b0a1b1a2b2a3b3").save(file)
    assert main(["plan", "--topology", str(file), "--buckets", "[1048576,26214400]"]) == 0
    shown = capsys.readouterr().out
    assert "reordered ring" in shown
    assert "(chosen)" in shown
    assert main(["plan", "--topology", str(file), "--buckets", "[1048576]", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["chosen"] in facts["algorithms"]
    assert main(["plan", "--topology", str(file), "--buckets", "[1]", "--collective", "allgather"]) == 2
    told = ["plan", "--topology", str(file), "--buckets", "[1048576]", "--switch-node", "core", "--json"]
    assert main(told) == 0
    fp32 = json.loads(capsys.readouterr().out)["algorithms"]["switchml"]["step_s"]
    assert main([*told, "--itemsize", "2"]) == 0
    assert json.loads(capsys.readouterr().out)["algorithms"]["switchml"]["step_s"] > 1.9 * fp32
    assert main(["plan", "--topology", str(file), "--switch-node", "core"]) == 2
