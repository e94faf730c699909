"""Switches that cannot copy, switches that can, and the other collectives."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
from paths import DATA

from trainkit.collectives import ForestError, Topology, allreduce_forest, fabrics, forest, optimum

CASES = {case["name"]: case for case in json.loads((DATA / "forest_cases.json").read_text())}


def unbalanced_star(**more: object) -> Topology:
    case = CASES["noneulerian_star6_up1_down4"]
    return Topology.from_dict({key: case[key] for key in ("name", "nodes", "compute_nodes", "links")} | more)


def test_unbalanced_star_without_and_with_multicast() -> None:
    best = optimum(unbalanced_star())
    assert (best.inv_rate, best.achievable) == (Fraction(5, 4), 5)
    trees = forest(unbalanced_star())
    assert (trees.inv_rate, trees.exact) == (5, True)
    multicast = forest(unbalanced_star(multicast=["sw"]))
    assert (multicast.inv_rate, multicast.k, multicast.unit) == (Fraction(5, 4), 4, 5)
    multicast.schedule(2).verify()
    # One way up for each tree, however many ways down.
    assert multicast.loads()["0", "sw"] == 4
    assert multicast.loads()["sw", "0"] == 20


def test_measured_rates_lose_little_to_whole_trees() -> None:
    # Adapters are switches with unequal ways in and out once rates are measured: 4 trees must be rounded anew.
    box = fabrics.dgx_a100(2)
    rates = {(u, v): f"{float(c) * (0.85 + 0.15 * (7 * i % 11) / 11):.2f}" for i, (u, v, c) in enumerate(box.links)}
    measured = box.with_links(rates)
    best = optimum(measured).achievable
    four = forest(measured, trees_per_root=4)
    assert best < four.inv_rate < best * Fraction(3, 2)
    assert not four.exact
    assert forest(measured).inv_rate == best


def test_adding_switch_helps_the_reduction() -> None:
    plain = unbalanced_star().transposed()
    assert forest(plain, "reduce_scatter").inv_rate == 5
    adding = forest(replace(plain, aggregate=frozenset({"sw"})), "reduce_scatter")
    assert adding.inv_rate == Fraction(5, 4)
    adding.schedule(2).verify()


def test_allreduce_inside_the_switch() -> None:
    box = fabrics.dgx_h100(1)
    without = allreduce_forest(box)
    within = allreduce_forest(replace(box, multicast=frozenset({"nv0"}), aggregate=frozenset({"nv0"})))
    # Everything goes up once and down once.
    assert within.time_per_byte == Fraction(1, 450) and within.exact
    assert without.time_per_byte / within.time_per_byte == Fraction(7, 4)
    within.schedule(2).verify()


def test_starved_copying_switch_is_left_out() -> None:
    # Spanning the slow spine would hold every tree to its rate; the box switches still copy.
    box = fabrics.boxes(2, 2, inside=100, uplink=10)
    links = [*box.links, ("nv0", "slow", 1), ("slow", "nv0", 1)]
    slow = Topology("slow", [*box.nodes, "slow"], box.compute_nodes, links, multicast=frozenset({"slow", "nv0", "nv1"}))
    assert forest(slow).inv_rate == optimum(box).inv_rate


def test_weights_divide_the_message() -> None:
    box = fabrics.dgx_a100(1)
    first, second, *_ = box.compute_nodes
    trees = forest(box, weights={first: 5, second: 0})
    assert trees.inv_rate == optimum(box, weights={first: 5, second: 0}).inv_rate
    assert {tree.root for tree in trees.trees} == set(box.compute_nodes) - {second}
    schedule = trees.schedule(2)
    schedule.verify()
    assert schedule.shards[0] == (0, Fraction(5, 11)) and schedule.shards[1] == (Fraction(5, 11), Fraction(5, 11))


@pytest.mark.parametrize("collective", ["broadcast", "reduce"])
def test_one_root(collective: str) -> None:
    box = fabrics.dgx_a100(2)
    trees = forest(box, collective, root="0.GPU.3")  # type: ignore[arg-type]
    assert trees.inv_rate == Fraction(1, 200)
    assert {tree.root for tree in trees.trees} == {"0.GPU.3"}
    trees.schedule(4).verify()
    assert trees.seconds(10**9) == Fraction(1, 200)
    # Data runs from the root, or to it.
    ends = trees.trees[0].edges
    assert (ends[0][0] if collective == "broadcast" else ends[-1][1]) == "0.GPU.3"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"collective": "allreduce"}, "use allreduce_forest"),
        ({"collective": "gossip"}, "must be one of"),
        ({"collective": "broadcast"}, "root belongs to broadcast"),
        ({"root": "0"}, "root belongs to broadcast"),
        ({"collective": "reduce", "root": "9"}, "root must name compute nodes"),
        ({"collective": "broadcast", "root": "0", "weights": {"0": 1}}, "has no shards"),
        ({"weights": {"x": 1}}, "weights must name compute nodes"),
        ({"weights": {"0": -1}}, "whole numbers >= 0"),
        ({"weights": {"0": 0, "1": 0, "2": 0, "3": 0}}, "must not all be 0"),
        ({"group": "01"}, "group is a list of compute nodes, got the text '01'"),
        ({"group": ["0"]}, "at least 2 different"),
        ({"group": ["0", "switch"]}, "group must name compute nodes"),
        ({"trees_per_root": 0}, "trees_per_root must be a whole number >= 1"),
        ({"max_height": 1.5}, "max_height must be a whole number"),
    ],
)
def test_wrong_questions_are_refused(arguments: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        forest(fabrics.star([1] * 4), **arguments)  # type: ignore[arg-type]


def test_max_height_says_the_least_reached() -> None:
    mesh = fabrics.mesh([3, 3])
    assert forest(mesh, max_height=4).height == 4
    with pytest.raises(ValueError, match="max_height=1 was not reached: the least height of all splittings tried is 2"):
        forest(fabrics.dgx_a100(2), max_height=1)
    assert forest(fabrics.dgx_h100(1), max_height=1).height == 1
    with pytest.raises(ValueError, match="max_height=3 was not reached: the least height of all splittings tried is 4"):
        forest(mesh, max_height=3)


def test_verify_finds_every_kind_of_fault() -> None:
    trees = forest(fabrics.dgx_a100(2))
    flat = trees.flat
    faults = {
        "carries": replace(trees, unit=trees.unit / 2, k=trees.k),
        "has 12 trees|has 13 trees": replace(trees, k=trees.k - 1),
        "does not exist": replace(trees, flat=replace(flat, path=flat.path[::-1].copy() * 0 + _swapped(flat.path))),
        "does not span": replace(trees, flat=replace(flat, edge_start=flat.edge_start.copy() + _bump(flat.edge_start))),
    }
    for words, broken in faults.items():
        with pytest.raises(ForestError, match=words):
            broken.verify()


def _swapped(path):  # type: ignore[no-untyped-def]
    """Every switch of a path replaced by another one: the ends stay, the links are gone."""
    wrong = path.copy()
    switch = int(max(path))
    wrong[path == switch] = switch - 1
    return wrong


def _bump(starts):  # type: ignore[no-untyped-def]
    change = starts * 0
    change[1] = 1
    return change


def test_progress_and_interrupt() -> None:
    seen = []

    def tell(phase: str, done: int, total: int) -> None:
        seen.append(phase)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        forest(fabrics.dgx_h100(8).with_links({("g3_0", "IB"): 25}), progress=tell)
    assert seen
