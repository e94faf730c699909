"""Schedules of direct-connect topologies: every chunk replayed, both directions, exact time, bounded chunks."""

import json
from fractions import Fraction
from math import lcm

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import DATA

from trainkit.collectives import BFB, ScheduleError, bfb, named_topology
from trainkit.collectives.direct import Transfers, members
from trainkit.collectives.direct._transfers import RECEIVER, SENDER, STEP

CASES = json.loads((DATA / "direct.json").read_text())
BANDWIDTH = 10**9

SMALL = [
    "complete(5)", "uniring(2, 7)", "biring(4, 6)", "kautz(3, 11)", "kautz(4, 12)", "de_bruijn(2, 4)", "torus(3, 4, 2)",
    "twisted_torus(2)", "hamming(2, 4)", "petersen()", "affine(4)", "diamond()", "line(diamond(), 2)",
    "degree_expansion(kautz(2, 6), 2)", "product(uniring(1, 3), petersen())", "cayley(metacyclic(3, 4, 2), 1, 3, 11, 6)",
    "cayley(metacyclic(4, 2, 3, 2), 1, 2)",
]  # fmt: skip
MIDDLE = ["kautz(4, 100)", "torus(8, 16)", "cayley(metacyclic(16, 8, 11), 8, 73, 114, 37)"]


def check(cost: BFB) -> None:
    """Replay all three collectives chunk by chunk and compare their time with the figures."""
    message, alpha = 10**6, Fraction(1, 10**5)
    phase = {
        "allgather": cost.t_l * alpha + cost.t_b * message / BANDWIDTH,
        "reduce_scatter": cost.t_l_reverse * alpha + cost.t_b_reverse * message / BANDWIDTH,
    }
    for collective, expected in (*phase.items(), ("allreduce", sum(phase.values()))):
        schedule = cost.schedule(collective, bandwidth=BANDWIDTH, unit="B/s")
        assert schedule.collective == collective
        schedule.verify()
        assert schedule.time(message, alpha) == expected


@pytest.mark.parametrize("name", SMALL)
def test_small_schedules(name: str) -> None:
    check(named_topology(name).bfb)


@pytest.mark.parametrize("name", MIDDLE)
def test_schedules_of_a_hundred_hosts(name: str) -> None:
    check(named_topology(name).bfb)


@given(st.integers(2, 10), st.data())
@settings(max_examples=25, deadline=None)
def test_schedules_of_irregular_graphs(nodes: int, data: st.DataObject) -> None:
    ends = st.integers(0, nodes - 1)
    graph = nx.MultiDiGraph((x, (x + 1) % nodes) for x in range(nodes))
    graph.add_edges_from(data.draw(st.lists(st.tuples(ends, ends), max_size=20)))
    cost = bfb(graph)
    # an irregular host may have ten in-links: then the exact split takes more chunks than the default allows
    exact = lcm(*(load.denominator for load in (*cost.steps, *cost.steps_reverse)))
    for collective in ("allgather", "reduce_scatter"):
        cost.schedule(collective, max_chunks=exact).verify()
    assert cost.transfers(exact).t_b() == cost.t_b


@pytest.mark.parametrize("case", CASES["replay"], ids=lambda case: case["topology"])
def test_transfers_replay_and_load_no_link_more(case: dict) -> None:
    cost = named_topology(case["topology"]).bfb
    for reverse, t_b in ((False, cost.t_b), (True, cost.t_b_reverse)):
        moved = cost.transfers(reverse=reverse)
        moved.replay()
        assert moved.t_b() == t_b
    assert cost.t_b == Fraction(case["t_b"])


@pytest.mark.parametrize("case", CASES["chunks"], ids=lambda case: case["topology"])
def test_chunks_of_the_exact_split(case: dict) -> None:
    # only each step's busiest link must be split exactly: the cases, which split every link so, are an upper bound
    split = named_topology(case["topology"]).bfb.chunking()
    assert split.loss == 0
    assert split.chunks <= case["chunks"]


def test_fewer_chunks_lose_what_is_reported() -> None:
    cost = named_topology("hypercube(6)").bfb
    losses = []
    for most in range(1, 7):
        split = cost.chunking(most)
        assert split.chunks <= most
        moved = cost.transfers(most)
        moved.replay()
        assert moved.t_b() <= cost.t_b * (1 + split.loss)
        losses.append(split.loss)
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > losses[-1] == 0
    with pytest.raises(ValueError, match="got max_chunks=0"):
        cost.chunking(0)


def test_hosts_keep_their_names() -> None:
    schedule = bfb(nx.DiGraph([("a", "b"), ("b", "c"), ("c", "a")])).schedule()
    assert schedule.ranks == ("a", "b", "c")
    assert set(schedule.links) == {("a", "b"), ("b", "c"), ("c", "a")}
    with pytest.raises(ValueError, match="two nodes read the same"):
        bfb(nx.DiGraph([(1, "1"), ("1", 1)])).schedule()
    with pytest.raises(ValueError, match="allgather, reduce_scatter or allreduce, got 'broadcast'"):
        bfb(nx.DiGraph([(0, 1), (1, 0)])).schedule("broadcast")  # type: ignore[arg-type]


def test_the_replay_sees_what_is_wrong() -> None:
    good = named_topology("torus(3, 3)").bfb.transfers()
    good.replay()

    def changed(column: int, value: int) -> Transfers:
        rows = good.rows.copy()
        rows[-1, column] = value
        return Transfers(good.graph, good.chunks, rows)

    with pytest.raises(ValueError, match="0 times, not 1"):
        Transfers(good.graph, good.chunks, good.rows[:-1]).replay()
    with pytest.raises(ValueError, match="before it holds it"):
        changed(STEP, 0).replay()
    with pytest.raises(ValueError, match="times, not"):
        changed(RECEIVER, int(good.rows[-1, SENDER])).replay()
    stranger = next(v for v in range(9) if not good.graph.networkx().has_edge(v, int(good.rows[-1, RECEIVER])))
    with pytest.raises(ValueError, match="there is no link"):
        changed(SENDER, stranger).loads()


def test_a_schedule_that_lost_a_transfer_is_refused() -> None:
    moved = named_topology("kautz(2, 6)").bfb.transfers()
    short = Transfers(moved.graph, moved.chunks, moved.rows[:-1])
    with pytest.raises(ScheduleError):
        short.schedule("short", tuple(map(str, range(6)))).verify()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["kautz(4, 1024)", "line(circulant(16, 3, 4), 3)", "hypercube(10)"])
def test_transfers_of_a_thousand_hosts(name: str) -> None:
    cost = named_topology(name).bfb
    for reverse, t_b in ((False, cost.t_b), (True, cost.t_b_reverse)):
        moved = cost.transfers(reverse=reverse)
        moved.replay()
        assert moved.t_b() == t_b
        assert np.all(moved.rows[:, STEP] < cost.t_l)


@pytest.mark.slow
@pytest.mark.parametrize("degree", [2, 3, 4])
@pytest.mark.parametrize("nodes", range(5, 129, 9))
def test_every_size_up_to_128(nodes: int, degree: int) -> None:
    check(named_topology(f"kautz({degree}, {nodes})").bfb)


@pytest.mark.slow
@pytest.mark.parametrize("degree", range(1, 7))
def test_the_whole_catalogue_up_to_128(degree: int) -> None:
    for nodes in range(2, 129):
        for name, _ in members(nodes, degree):
            cost = named_topology(name).bfb
            for reverse, t_b in ((False, cost.t_b), (True, cost.t_b_reverse)):
                moved = cost.transfers(reverse=reverse)
                moved.replay()
                assert moved.t_b() == t_b, name
