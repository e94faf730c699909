"""Random networks against the definition: all cuts, one by one."""

from fractions import Fraction
from itertools import combinations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trainkit.collectives import Topology, TopologyError, allreduce_forest, forest, optimum

QUIET = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow]
)


@st.composite
def networks(draw: st.DrawFn, most: int = 7, two_way: bool = False, largest: int = 10**9) -> Topology:
    size = draw(st.integers(2, most))
    compute = draw(st.integers(2, size))
    names = [f"n{i}" for i in range(size)]
    capacity = st.one_of(st.integers(1, 9), st.integers(1, largest))
    # A ring through all keeps it connected, in a drawn order; then links at will.
    order = draw(st.permutations(names))
    pairs = {(u, v): draw(capacity) for u, v in zip(order, order[1:] + order[:1], strict=True)}
    for u, v in draw(st.lists(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=14)):
        if u != v:
            pairs[u, v] = draw(capacity)
    if two_way:
        pairs = {pair: c for (u, v), c in pairs.items() for pair in ((u, v), (v, u))}
    return Topology("random", names, names[:compute], [(u, v, c) for (u, v), c in pairs.items()])


def by_cuts(topology: Topology, weight: dict[str, int]) -> Fraction:
    best = Fraction(0)
    for size in range(1, len(topology.nodes)):
        for chosen in combinations(topology.nodes, size):
            inside = set(chosen)
            if inside >= set(topology.compute_nodes):
                continue
            leaving = sum((c for u, v, c in topology.links if u in inside and v not in inside), Fraction(0))
            best = max(best, sum(weight.get(v, 0) for v in inside) / leaving)
    return best


@QUIET
@given(networks(most=10))
def test_bound_is_the_worst_of_all_cuts(topology: Topology) -> None:
    assert optimum(topology).inv_rate == by_cuts(topology, dict.fromkeys(topology.compute_nodes, 1))


@QUIET
@given(networks(), st.data())
def test_weights_and_roots(topology: Topology, data: st.DataObject) -> None:
    weight = {name: data.draw(st.integers(0, 4)) for name in topology.compute_nodes}
    weight[topology.compute_nodes[0]] += 1
    assert optimum(topology, weights=weight).inv_rate == by_cuts(topology, weight)
    root = data.draw(st.sampled_from(topology.compute_nodes))
    assert optimum(topology, "broadcast", root=root).inv_rate == by_cuts(topology, {root: 1})
    assert optimum(topology, "reduce", root=root).inv_rate == by_cuts(topology.transposed(), {root: 1})


@QUIET
@given(networks(two_way=True))
def test_two_way_networks_are_packed_at_the_bound(topology: Topology) -> None:
    best = optimum(topology)
    trees = forest(topology)
    assert trees.inv_rate == best.inv_rate == best.achievable
    back = forest(topology, "reduce_scatter")
    assert back.inv_rate == best.inv_rate
    # Fixed numbers of trees: never better than the optimum, exact by their own claim, and equal at its own k.
    for k in (1, 3):
        given_k = forest(topology, trees_per_root=k)
        assert given_k.exact and given_k.inv_rate >= best.inv_rate


@QUIET
@given(networks(most=6, two_way=True, largest=9))
def test_fixed_k_is_the_smallest_unit(topology: Topology) -> None:
    trees = forest(topology, trees_per_root=2)
    # Any smaller unit rounds to capacities whose own bound needs more than two trees' room.
    smaller = trees.unit - Fraction(1, 10**6)
    rounded = [(u, v, int(smaller * c)) for u, v, c in topology.links if int(smaller * c) > 0]
    try:
        thin = Topology("thin", topology.nodes, topology.compute_nodes, rounded)
    except TopologyError:
        return
    assert optimum(thin).inv_rate > Fraction(1, 2)


@QUIET
@given(networks(most=6, largest=20))
def test_one_way_networks_reach_what_is_achievable(topology: Topology) -> None:
    best = optimum(topology)
    trees = forest(topology)
    assert best.achievable >= best.inv_rate
    assert trees.inv_rate == best.achievable
    trees.schedule().verify()
    rounded = forest(topology, trees_per_root=1)
    assert rounded.inv_rate >= best.achievable


@QUIET
@given(networks(most=6, two_way=True, largest=20))
def test_allreduce_beats_its_halves_and_replays(topology: Topology) -> None:
    both = allreduce_forest(topology)
    assert both.exact
    halves = 2 * optimum(topology).achievable / len(topology.compute_nodes)
    assert halves / 2 <= both.time_per_byte <= halves
    both.schedule().verify()


@QUIET
@given(networks(most=7, two_way=True, largest=20), st.data())
def test_groups_pass_through_others(topology: Topology, data: st.DataObject) -> None:
    group = data.draw(st.lists(st.sampled_from(topology.compute_nodes), min_size=2, unique=True))
    trees = forest(topology, group=group)
    assert trees.inv_rate == by_cuts(Topology("group", topology.nodes, group, topology.links), dict.fromkeys(group, 1))
    trees.schedule(2).verify()
    both = allreduce_forest(topology, group=group)
    assert both.exact
    both.schedule().verify()
