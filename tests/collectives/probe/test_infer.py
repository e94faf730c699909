"""What the probe infers: groups exact and capacities right behind noise; no group where there is none."""

import random
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from probe_network import Network, found

from trainkit.collectives._probe._coordinator import RoundTrips
from trainkit.collectives._probe._infer import Declared, infer
from trainkit.collectives._probe._leader import _claimed_by_hops
from trainkit.collectives._probe._result import HostFacts, topology
from trainkit.collectives._probe._rounds import Plan, inward, outward, tournament
from trainkit.collectives._probe._tree import Flows, crossings, shares


@st.composite
def _racks(draw: st.DrawFn) -> tuple[list[list[int]], list[float], list[float]]:
    sizes = draw(st.lists(st.integers(2, 5), min_size=2, max_size=4))
    hosts = draw(st.permutations(range(sum(sizes))))
    groups = [sorted(hosts[sum(sizes[:i]) : sum(sizes[: i + 1])]) for i in range(len(sizes))]
    rate = [10.0] * len(hosts)
    if draw(st.booleans()):
        rate[draw(st.integers(0, len(hosts) - 1))] = draw(st.sampled_from([3.0, 5.0]))
    over = draw(st.lists(st.floats(2, 4), min_size=len(sizes), max_size=len(sizes)))
    return groups, rate, [sum(rate[h] for h in group) / by for group, by in zip(groups, over, strict=True)]


@settings(max_examples=15, deadline=None, derandomize=True)
@given(_racks(), st.integers(0, 1000))
def test_random_racks_are_found_with_their_capacities(
    case: tuple[list[list[int]], list[float], list[float]], seed: int
) -> None:
    groups, rate, uplink = case
    tree = Network(rate, groups, uplink, 0.04, seed).probed()
    assert found(tree) == sorted(groups)
    assert tree.up[: len(rate)] / 1e6 == pytest.approx(rate, rel=0.15)
    for vertex in range(len(rate), len(tree.sets)):
        one = groups.index(np.flatnonzero(tree.sets[vertex]).tolist())
        # No more can be seen of an uplink than the others take together.
        assert tree.up[vertex] / 1e6 == pytest.approx(min(uplink[one], sum(uplink) - uplink[one]), rel=0.15)
    assert tree.limiting.all()
    assert tree.fit < 0.1


@pytest.mark.parametrize("hosts", [2, 3, 5, 8, 16])
@pytest.mark.parametrize("seed", range(3))
def test_one_switch_gives_no_group(hosts: int, seed: int) -> None:
    rate = [10.0] * hosts
    rate[0] = 3.0
    tree = Network(rate, [], [], 0.06, seed).probed()
    assert found(tree) == []
    assert tree.up / 1e6 == pytest.approx(rate if hosts > 2 else [3, 3], rel=0.15)


def test_pods_of_racks_are_two_levels() -> None:
    hosts = random.Random(1).sample(range(16), 16)
    racks = [sorted(hosts[i : i + 4]) for i in range(0, 16, 4)]
    pods = [sorted(racks[0] + racks[1]), sorted(racks[2] + racks[3])]
    tree = Network([10.0] * 16, [*racks, *pods], [20.0] * 4 + [15.0] * 2, 0.04, 0).probed()
    assert found(tree) == sorted([*racks, *pods])
    network = topology(tree, RoundTrips(), [HostFacts(f"h{i}") for i in range(16)], 1)
    assert network.switches == ("rack0", "rack1", "rack2", "rack3", "pod0", "pod1", "core")
    rates = {(u, v): float(rate) for u, v, rate in network.links}
    assert rates["pod0", "core"] == pytest.approx(15, rel=0.1)


def test_uplinks_as_wide_as_their_hosts_do_not_show_and_a_declaration_names_them() -> None:
    network = Network([10.0] * 8, [[0, 2, 4, 6], [1, 3, 5, 7]], [40.0, 40.0], 0.04, 0)
    assert found(network.probed()) == []
    tree = network.probed([Declared(["even", "odd"] * 4, "the file")])
    assert found(tree) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert set(tree.names.values()) == {"even", "odd"}
    assert not tree.limiting[8:].any()
    assert tree.up[8:] / 1e6 == pytest.approx([40, 40], rel=0.1)


def test_a_declaration_that_the_measurement_contradicts_is_set_aside_with_a_word() -> None:
    network = Network([10.0] * 8, [[0, 2, 4, 6], [1, 3, 5, 7]], [10.0, 10.0], 0.04, 0)
    tree = network.probed([Declared(["a"] * 4 + ["b"] * 4, "the file")])
    assert found(tree) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert "the file was set aside" in tree.warnings[0]


def test_a_declaration_in_agreement_gives_its_names_and_hosts_without_label_stay_where_they_are() -> None:
    network = Network([10.0] * 6, [[0, 1, 2], [3, 4, 5]], [10.0, 10.0], 0.04, 0)
    tree = network.probed([Declared(["a", "a", "a", "b", "b", "b"], "the file")])
    assert {name: np.flatnonzero(tree.sets[v]).tolist() for v, name in tree.names.items()} == {
        "a": [0, 1, 2],
        "b": [3, 4, 5],
    }


def test_asymmetric_hosts_keep_both_rates() -> None:
    flows = [Flows.of([(u, v, 5.0 if u == 0 else 10.0), (v, u, 10.0)]) for u, v in combinations(range(4), 2)] * 4
    tree = infer(flows, 4)
    assert tree.up == pytest.approx([5, 10, 10, 10])
    assert tree.down == pytest.approx([10, 10, 10, 10])


def test_shares_are_max_min_fair() -> None:
    # Three flows over one link of 9, one of them held to 1 elsewhere.
    sets = np.eye(4, dtype=bool)
    flows = Flows.of([(0, 1, 0.0), (0, 2, 0.0), (0, 3, 0.0)])
    capacity = np.array([9.0, 9, 9, 9, 9, 9, 9, 1])
    assert shares(crossings(sets, flows), capacity) == pytest.approx([4, 4, 1])


@pytest.mark.parametrize("hosts", [2, 3, 4, 7, 16, 33])
def test_a_tournament_meets_every_pair_once_in_disjoint_rounds(hosts: int) -> None:
    rounds = tournament(hosts, random.Random(0))
    assert len(rounds) == Plan(hosts, 1, 1).ping_rounds
    assert all(len({host for pair in one for host in pair}) == 2 * len(one) for one in rounds)
    assert sorted(tuple(sorted(pair)) for one in rounds for pair in one) == list(combinations(range(hosts), 2))


def test_tests_of_groups_leave_or_stay() -> None:
    rng = random.Random(0)
    out = outward([0, 1, 2], [[3, 4], [5]], rng)
    assert {u for u, v in out if v in (0, 1, 2)} == {3, 4, 5}
    assert all((u < 3) != (v < 3) for u, v in out)
    stay = inward([[0, 1, 2], [3]], rng)
    assert sorted(u for u, _ in stay) == sorted(v for _, v in stay) == [0, 1, 2]


def test_64_hosts_take_less_than_10_minutes() -> None:
    assert Plan(64, 0.15, 0.35).seconds < 600


def test_hops_make_racks_only_where_nearness_is_an_equivalence() -> None:
    racks = {(u, v): 1 if u // 2 == v // 2 else 3 for u, v in combinations(range(6), 2)}
    claim = _claimed_by_hops(RoundTrips(hops=racks), 6)
    assert claim is not None
    assert len(set(claim.label)) == 3
    line = {(u, v): v - u for u, v in combinations(range(6), 2)}
    assert _claimed_by_hops(RoundTrips(hops=line), 6) is None
    assert _claimed_by_hops(RoundTrips(hops=dict.fromkeys(racks, 1)), 6) is None


def test_latencies_of_links_add_up_to_half_the_round_trips() -> None:
    tree = Network([10.0] * 4, [[0, 1], [2, 3]], [5.0, 5.0], 0.0, 0).probed()
    trips = RoundTrips({(u, v): 2e-5 if u // 2 == v // 2 else 8e-5 for u, v in combinations(range(4), 2)})
    network = topology(tree, trips, [HostFacts(name) for name in "abcd"], 1)
    rack = {u: v for u, v, _ in network.links if u in "abcd"}
    across = sum(
        network.latency[link] for link in [("a", rack["a"]), (rack["a"], "core"), ("core", rack["c"]), (rack["c"], "c")]
    )
    assert across == pytest.approx(4e-5)
    assert network.latency["a", rack["a"]] + network.latency[rack["b"], "b"] == pytest.approx(1e-5)


def test_rates_that_noise_cannot_tell_apart_are_one() -> None:
    tree = Network([10.0, 10.0, 10.0, 4.0], [], [], 0.03, 1).probed()
    network = topology(tree, RoundTrips(), [HostFacts(name) for name in "abcd"], 1)
    assert len({rate for _, _, rate in network.links}) == 2
    assert network.balanced
