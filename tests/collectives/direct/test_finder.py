"""The finder: known frontiers, bounds, seeds, going on from a file, sizes that do not exist."""

import json
from fractions import Fraction
from pathlib import Path

import pytest

from trainkit.collectives import bfb, find_topologies, named_topology
from trainkit.collectives.direct import Frontier, Progress
from trainkit.collectives.direct._groups import Metacyclic, cayley, groups, table
from trainkit.collectives.direct._search import Explorer, Pool

Point = tuple[int, str]


def explored(nodes: int, degree: int, batches: int, *, directed: bool = True, seed: int = 0) -> Frontier:
    """The finder without its clock: so many batches, whatever the machine's load."""
    pool = Pool(nodes, degree, directed=directed, seed=seed)
    explorer = Explorer(directed=directed, seed=seed, late=lambda: False)
    explorer.start(pool)
    while pool.searchable and pool.batches < batches and not pool.frontier.proven:
        pool.search()
    explorer.expand(pool)
    return pool.frontier


def holds(frontier: Frontier, point: Point) -> bool:
    return any(one.t_l <= point[0] and one.t_b <= Fraction(point[1]) for one in frontier)


def check(frontier: Frontier) -> None:
    """What holds of every answer."""
    assert frontier
    for one in (*frontier, *frontier.balanced):
        again = bfb(one.graph)
        assert (again.nodes, again.degree) == (frontier.nodes, frontier.degree)
        assert (again.t_l, again.t_b, again.t_b_reverse) == (one.t_l, one.t_b, one.t_b_reverse)
        assert one.t_l >= frontier.least_t_l
        assert min(one.t_b, one.t_b_reverse) >= frontier.least_t_b
        assert frontier.directed or again.digraph.symmetric
    points = [(one.t_l, one.t_b) for one in frontier]
    assert [t_l for t_l, _ in points] == sorted({t_l for t_l, _ in points})
    assert [t_b for _, t_b in points] == sorted({t_b for _, t_b in points}, reverse=True)


@pytest.mark.parametrize(
    ("nodes", "batches", "points"),
    [
        (16, 120, [(2, "1"), (3, "15/16")]),
        (32, 40, [(3, "31/32")]),
        (64, 40, [(4, "63/64")]),
        (128, 40, [(5, "127/128")]),
        (256, 15, [(5, "255/256")]),
        (512, 15, [(6, "511/512")]),
    ],
)
def test_degree_four(nodes: int, batches: int, points: list[Point]) -> None:
    frontier = explored(nodes, 4, batches)
    check(frontier)
    assert all(holds(frontier, point) for point in points), [(one.t_l, str(one.t_b)) for one in frontier]


@pytest.mark.parametrize("nodes", range(5, 14))
def test_both_bounds_are_met_at_small_sizes(nodes: int) -> None:
    """A bandwidth-optimal topology of the least number of steps exists for 5 to 13 hosts of degree 4."""
    frontier = explored(nodes, 4, 20)
    assert [(one.t_l, one.t_b) for one in frontier] == [(frontier.least_t_l, frontier.least_t_b)]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("directed", "points"),
    [(True, [(5, "341/256"), (6, "1"), (7, "1023/1024")]), (False, [(8, "1023/1024")])],
)
def test_a_thousand_hosts(directed: bool, points: list[Point]) -> None:
    frontier = explored(1024, 4, 150, directed=directed)
    check(frontier)
    assert all(holds(frontier, point) for point in points), [(one.t_l, str(one.t_b)) for one in frontier]


@pytest.mark.parametrize(
    ("nodes", "degree", "directed"),
    [
        (2, 1, False), (2, 3, True), (3, 1, True), (4, 3, False), (4, 5, False), (7, 20, True), (10, 3, False), (13, 3, True),
        (17, 4, False), (18, 5, False), (23, 2, False), (31, 20, False), (97, 4, True), (6, 17, True),
    ],
)  # fmt: skip
def test_every_size_gets_an_answer(nodes: int, degree: int, directed: bool) -> None:
    check(explored(nodes, degree, 2, directed=directed))


@pytest.mark.parametrize(
    ("nodes", "degree", "directed", "what"),
    [
        (1, 4, True, "at least 2 hosts, got nodes=1"),
        (0, 4, False, "at least 2 hosts, got nodes=0"),
        (8, 0, True, "at least 1 port, got degree=0"),
        (8, 1, False, "connects only pairs, not 8 hosts"),
        (9, 3, False, "9 hosts of degree 3 have an odd number of ports"),
        (70_000, 4, True, "2 to 65000 hosts"),
    ],
)
def test_sizes_that_do_not_exist(nodes: int, degree: int, directed: bool, what: str) -> None:
    with pytest.raises(ValueError, match=what):
        find_topologies(nodes, degree, directed=directed, seconds=1)


def test_it_stops_where_nothing_better_can_exist() -> None:
    frontier = find_topologies(32, 4, seconds=250)
    assert frontier.proven
    assert [(one.t_l, one.t_b) for one in frontier] == [(3, Fraction(31, 32))]
    assert frontier.best([10**3, 10**9], alpha=1e-5, bandwidth=1e10) is frontier.balanced[0]


def test_the_seed_decides() -> None:
    one, same, other = (explored(48, 3, 6, seed=seed) for seed in (1, 1, 2))
    assert [x.name for x in one] == [x.name for x in same]
    assert [x.name for x in one] != [x.name for x in other]


def test_a_search_goes_on_from_its_file(tmp_path: Path) -> None:
    file = tmp_path / "search.json"
    told: list[Progress] = []
    first = find_topologies(16, 4, seconds=2, seed=7, state=file, progress=told.append)
    assert told
    assert told[-1].frontier == first
    saved = json.loads(file.read_text())
    second = find_topologies(16, 4, seconds=2, seed=99, state=file)
    again = json.loads(file.read_text())
    assert again["seed"] == saved["seed"] == 7
    assert again["batches"] > saved["batches"] > 0
    assert second.tried > first.tried
    assert all(holds(second, (one.t_l, str(one.t_b))) for one in first)
    assert [path.name for path in tmp_path.iterdir()] == ["search.json"]

    with pytest.raises(ValueError, match="belongs to a search with nodes=16, not 17"):
        find_topologies(17, 4, seconds=1, state=file)
    file.write_text(json.dumps(saved | {"names": None}))
    with pytest.raises(ValueError, match="is damaged"):
        find_topologies(16, 4, seconds=1, state=file)
    file.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        find_topologies(16, 4, seconds=1, state=file)
    file.write_text("[]")
    with pytest.raises(ValueError, match="is not the state of a topology search"):
        find_topologies(16, 4, seconds=1, state=file)


def test_the_best_for_a_job() -> None:
    frontier = explored(16, 4, 120)
    small = frontier.best(10**3, alpha=1e-5, bandwidth=1e10)
    large = frontier.best(10**9, alpha=1e-5, bandwidth=1e10)
    assert (small.t_l, large.t_l) == (2, 3)
    for one, size in ((small, 10**3), (large, 10**9)):
        expected = 2 * one.t_l * 1e-5 + float(one.t_b_sum) * size / 1e10
        assert one.seconds(size, 1e-5, 1e10) == pytest.approx(expected)
    with pytest.raises(ValueError, match="sizes and bandwidth must be positive"):
        frontier.best(0, alpha=1e-5, bandwidth=1e10)


def test_all_reduce_is_chosen_by_both_directions() -> None:
    """A topology whose transpose is worse stays on the frontier of all-gather, not of all-reduce."""
    lame, even = named_topology("cayley(metacyclic(3, 4, 2), 1, 3, 11, 6)"), named_topology("optimal_circulant(12)")
    assert (lame.t_l, lame.t_b) == (even.t_l, even.t_b)
    frontier = Frontier([lame, even], 12, 4, directed=True, tried=0)
    assert list(frontier) == frontier.balanced == [even]


def test_tables_are_groups() -> None:
    for group in [group for family in groups(16) for group in family] + [Metacyclic(7, 3, 2)]:
        right = table(group).astype(int)
        order = group.order
        assert (right[0] == range(order)).all()
        assert (right[:, 0] == range(order)).all()
        assert all(sorted(row) == list(range(order)) for row in right)
        # associative: x -> (x g) h is x -> x (g h)
        assert all((right[h][right[g]] == right[right[h][g]]).all() for g in range(order) for h in range(order))
        assert all((right[g] == group.translation(g)).all() for g in range(order))


def test_groups_that_do_not_commute_are_among_them() -> None:
    kinds = {(group.m, group.k, group.r, group.s) for family in groups(8) for group in family}
    assert {(8, 1, 1, 0), (4, 2, 1, 0), (4, 2, 3, 0), (4, 2, 3, 2)} <= kinds
    quaternion = bfb(cayley(Metacyclic(4, 2, 3, 2), 1, 2))
    assert (quaternion.t_l, quaternion.t_b) == (3, Fraction(7, 8))
