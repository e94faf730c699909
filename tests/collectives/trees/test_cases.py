"""Every case with a known exact answer: bounds, trees, fixed numbers of trees, all-reduce, schedules."""

import json
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
from paths import DATA

import trainkit.collectives._native as native
from trainkit.collectives import Forest, Topology, allreduce_forest, forest, optimum
from trainkit.collectives.trees._flat import Flat

CASES = json.loads((DATA / "forest_cases.json").read_text())
SMALL = [case for case in CASES if len(case["compute_nodes"]) <= 32]


def network(case: dict[str, Any]) -> Topology:
    return Topology.from_dict(
        {key: case[key] for key in ("name", "nodes", "compute_nodes", "links")} | {"unit": "GB/s"}
    )


def ids(cases: list[dict[str, Any]]) -> list[str]:
    return [case["name"] for case in cases]


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_optimum_and_its_bottleneck(case: dict[str, Any]) -> None:
    topology = network(case)
    best = optimum(topology)
    assert best.inv_rate == Fraction(case["inv_x_star"])
    assert best.achievable == Fraction(case["inv_x_star_no_multicast"])
    cut = best.bottleneck
    leaving = sum(capacity for u, v, capacity in topology.links if u in cut and v not in cut)
    assert Fraction(len(cut & set(topology.compute_nodes))) / leaving == best.inv_rate
    assert not cut >= set(topology.compute_nodes)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_forest_reaches_it_on_physical_links(case: dict[str, Any]) -> None:
    topology = network(case)
    trees = forest(topology)
    assert trees.inv_rate == Fraction(case["inv_x_star_no_multicast"])
    assert trees.exact
    if case["switch_balanced"]:
        assert (trees.k, trees.unit) == (case["k"], Fraction(case["U"]))
    if len(topology.compute_nodes) <= 64:
        check_slowly(trees)


def check_slowly(trees: Forest) -> None:
    """The rules of a forest in plain Python, beside the vectorised check."""
    load: dict[tuple[str, str], int] = {}
    per_root: dict[str, int] = {}
    links = {(u, v): capacity for u, v, capacity in trees.topology.links}
    compute = set(trees.topology.compute_nodes)
    for tree in trees.trees:
        reached = {tree.root}
        for (tail, head), path in zip(tree.edges, tree.paths, strict=True):
            assert tail in reached and head not in reached
            assert (path[0], path[-1]) == (tail, head)
            assert not compute & set(path[1:-1])
            reached.add(head)
            for link in pairwise(path):
                load[link] = load.get(link, 0) + tree.multiplicity
        assert reached == compute
        per_root[tree.root] = per_root.get(tree.root, 0) + tree.multiplicity
    assert per_root == dict.fromkeys(compute, trees.k)
    assert all(amount <= int(trees.unit * links[link]) for link, amount in load.items())
    assert {link: amount for link, amount in trees.loads().items() if amount} == load


@pytest.mark.parametrize("case", [c for c in CASES if "fixed_k" in c], ids=lambda case: case["name"])
def test_given_numbers_of_trees(case: dict[str, Any]) -> None:
    topology = network(case)
    for k, inv_rate in case["fixed_k"].items():
        trees = forest(topology, trees_per_root=int(k))
        assert (trees.k, trees.inv_rate, trees.exact) == (int(k), Fraction(inv_rate), True)


@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_no_taller_than_plain_splitting(case: dict[str, Any]) -> None:
    if not case["switch_balanced"] or len(case["compute_nodes"]) > 64:
        pytest.skip("plain splitting refuses unbalanced switches, and is slow on large networks")
    topology = network(case)
    trees = forest(topology)
    tail, head, _ = topology.arcs
    cap = trees._limit
    plain = Flat(*native.pack_trees(len(topology.nodes), tail, head, cap, trees.weight * trees.k, topology.compute, 0))
    assert trees.height <= plain.height


@pytest.mark.parametrize(
    ("name", "most"), [("dgx_a100_2x8", 5), ("dgx_a100_8x8_64", 4), ("dgx_h100_16x8_128", 4), ("dgx_h100_32x8_256", 4)]
)
def test_heights_of_boxes(name: str, most: int) -> None:
    assert forest(network(next(case for case in CASES if case["name"] == name))).height <= most


@pytest.mark.parametrize("case", [c for c in CASES if "allreduce_time_per_M_lp" in c], ids=lambda case: case["name"])
def test_allreduce_is_exact_and_proved(case: dict[str, Any]) -> None:
    both = allreduce_forest(network(case))
    assert both.time_per_byte == Fraction(case["allreduce_time_per_M_lp"])
    assert both.exact
    up, down = both.reduce.loads(), both.broadcast.loads()
    for u, v, capacity in both.topology.links:
        assert up[u, v] + down[u, v] <= both.reduce.unit * capacity


@pytest.mark.parametrize(
    "case", [c for c in CASES if len(c["compute_nodes"]) == 64 or "h100_16" in c["name"]], ids=lambda c: c["name"]
)
def test_allreduce_at_scale(case: dict[str, Any]) -> None:
    both = allreduce_forest(network(case))
    assert both.exact
    assert both.time_per_byte <= 2 * Fraction(case["inv_x_star"]) / len(case["compute_nodes"])


@pytest.mark.parametrize("case", SMALL, ids=ids(SMALL))
def test_schedules_replay(case: dict[str, Any]) -> None:
    topology = network(case)
    for collective in ("allgather", "reduce_scatter"):
        forest(topology, collective).schedule().verify()  # type: ignore[arg-type]
    allreduce_forest(topology).schedule().verify()


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in CASES if len(c["compute_nodes"]) == 64], ids=lambda case: case["name"])
def test_schedules_replay_at_64(case: dict[str, Any]) -> None:
    topology = network(case)
    forest(topology).schedule().verify()
    forest(topology, "reduce_scatter").schedule().verify()
    allreduce_forest(topology).schedule().verify()


@pytest.mark.parametrize(
    "name", ["mesh3x3", "star8_one_slow", "two_box_2x4_switch10_spine1", "emu_E7_two_K4_100_cross40_20_20_10"]
)
def test_fine_chunks_tend_to_the_bound(name: str) -> None:
    trees = forest(network(next(case for case in CASES if case["name"] == name)))
    bound = trees.seconds(10**9)
    times = [trees.schedule(chunks).time(10**9, alpha=0) / bound for chunks in (1, 4, 64)]
    assert times[0] > times[1] > times[2] >= 1
    assert times[2] < 1 + Fraction(1, 50)


def test_te_ccl_outputs_are_matched_or_beaten() -> None:
    # Units of the case are half GB/s; TE-CCL's published outputs are in the case.
    case = next(case for case in CASES if case["name"] == "teccl_ndv2_4x8")
    bandwidth = optimum(network(case)).algorithmic_bandwidth() / 2
    assert bandwidth == Fraction(50, 3)
    assert all(float(bandwidth) > other for other in case["published"]["te_ccl_algbw_GBps"].values())
