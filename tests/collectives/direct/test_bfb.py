"""Exact cost of breadth-first broadcast: known topologies, the linear program, both directions, refused graphs."""

import json
from fractions import Fraction

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import DATA
from scipy.optimize import linprog

from trainkit.collectives import bfb, named_topology
from trainkit.collectives.direct import least_steps

CASES = json.loads((DATA / "direct.json").read_text())


@pytest.mark.parametrize("case", CASES["cost"], ids=lambda case: case["topology"])
def test_known_topologies(case: dict) -> None:
    cost = named_topology(case["topology"]).bfb
    assert (cost.nodes, cost.degree) == (case["nodes"], case["degree"])
    assert (cost.t_l, cost.t_b) == (case["t_l"], Fraction(case["t_b"]))
    assert list(cost.steps) == [Fraction(load) for load in case.get("steps", cost.steps)]
    assert cost.t_b == Fraction(cost.degree, cost.nodes) * sum(cost.steps)
    assert cost.t_l >= least_steps(cost.nodes, cost.degree)
    assert cost.t_b >= Fraction(cost.nodes - 1, cost.nodes)


@pytest.mark.parametrize("case", CASES["both_ways"], ids=lambda case: case["topology"])
def test_the_transpose_may_cost_more(case: dict) -> None:
    cost = named_topology(case["topology"]).bfb
    assert (cost.t_b, cost.t_b_reverse) == (Fraction(case["t_b"]), Fraction(case["t_b_reverse"]))
    turned = bfb(cost.graph.reverse())
    assert (turned.t_b, turned.t_b_reverse) == (cost.t_b_reverse, cost.t_b)
    assert turned.t_l == cost.t_l_reverse == cost.t_l


def by_linear_program(graph: "nx.MultiDiGraph[int]") -> list[float]:
    """Step -> load of the busiest link: for each receiver and step the transportation problem as it is defined."""
    distance = dict(nx.all_pairs_shortest_path_length(graph))
    worst: dict[int, float] = {}
    for u in graph:
        senders = [w for w in set(graph.predecessors(u)) if w != u]
        for t in sorted({distance[v][u] for v in graph} - {0}):
            usable = [(v, w) for v in graph if distance[v][u] == t for w in senders if distance[v].get(w, -1) == t - 1]
            sources = sorted({v for v, _ in usable})
            whole = np.zeros((len(sources), len(usable) + 1))
            room = np.zeros((len(senders), len(usable) + 1))
            for column, (v, w) in enumerate(usable):
                whole[sources.index(v), column] = 1
                room[senders.index(w), column] = 1
            room[:, -1] = [-graph.number_of_edges(w, u) for w in senders]
            cost = np.zeros(len(usable) + 1)
            cost[-1] = 1
            found = linprog(cost, room, np.zeros(len(senders)), whole, np.ones(len(sources)), method="highs")
            worst[t] = max(worst.get(t, 0.0), found.fun)
    return [worst[t] for t in sorted(worst)]


@st.composite
def strong_multigraphs(draw: st.DrawFn) -> "nx.MultiDiGraph[int]":
    """Irregular graphs with parallel links and self-loops, made strong by a ring."""
    nodes = draw(st.integers(2, 9))
    ends = st.integers(0, nodes - 1)
    graph = nx.MultiDiGraph((x, (x + 1) % nodes) for x in range(nodes))
    graph.add_edges_from(draw(st.lists(st.tuples(ends, ends), max_size=25)))
    return graph


@given(strong_multigraphs())
@settings(max_examples=25, deadline=None)
def test_the_closed_form_is_the_linear_program(graph: "nx.MultiDiGraph[int]") -> None:
    cost = bfb(graph)
    assert [float(load) for load in cost.steps] == pytest.approx(by_linear_program(graph), abs=1e-7)
    back = by_linear_program(graph.reverse())
    assert [float(load) for load in cost.steps_reverse] == pytest.approx(back, abs=1e-7)
    degrees = [degree for _, degree in (*graph.in_degree(), *graph.out_degree())]
    assert cost.degree == max(degrees)


@pytest.mark.parametrize(("degree", "nodes"), [(12, 30), (3, 40), (14, 17)])
def test_random_regular_graphs_above_and_below_the_switch_to_flows(degree: int, nodes: int) -> None:
    graph = nx.MultiDiGraph(nx.random_regular_graph(degree, nodes, seed=degree).to_directed())
    assert [float(load) for load in bfb(graph).steps] == pytest.approx(by_linear_program(graph), abs=1e-7)


def test_parallel_links_share_the_load() -> None:
    graph = nx.MultiDiGraph([(0, 1)] * 3 + [(1, 0)] * 3)
    assert (bfb(graph).degree, bfb(graph).t_b) == (3, Fraction(1, 2))


def test_a_self_loop_is_a_wasted_port() -> None:
    ring = [(0, 1), (1, 2), (2, 0)]
    assert bfb(nx.DiGraph(ring)).t_b == Fraction(2, 3)
    assert bfb(nx.DiGraph([*ring, (1, 1)])).t_b == Fraction(4, 3)


@pytest.mark.parametrize("name", ["kautz(4, 20)", "torus(5, 6)", "cayley(metacyclic(16, 8, 11), 8, 73, 114, 37)"])
def test_one_host_is_enough_where_all_look_alike(name: str) -> None:
    graph = named_topology(name).graph
    assert bfb(graph, vertex_transitive=True) == bfb(graph)


def test_refused_graphs() -> None:
    with pytest.raises(ValueError, match=r"every host must reach every other, but 'b' does not reach 'a': add links"):
        bfb(nx.DiGraph([("a", "b"), ("b", "c"), ("c", "b")]))
    with pytest.raises(ValueError, match="has 2 to 65000 hosts, got 1"):
        bfb(nx.DiGraph([(0, 0)]))
    with pytest.raises(ValueError, match=r"pass graph\.to_directed\(\)"):
        bfb(nx.cycle_graph(4))


def test_moore_bound() -> None:
    assert [least_steps(n, 4) for n in (2, 5, 6, 21, 22, 85, 86, 1024)] == [1, 1, 2, 2, 3, 3, 4, 5]
    assert [least_steps(n, 3, directed=False) for n in (4, 5, 10, 11, 22, 23)] == [1, 2, 2, 3, 3, 4]
    assert least_steps(9, 2, directed=False) == 4
    assert least_steps(5, 1) == 4
