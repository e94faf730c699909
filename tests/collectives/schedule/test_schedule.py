"""The schedule form: what replay refuses, the clock, the file."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainkit.collectives import Op, Schedule, ScheduleError, fabrics, forest, ring_schedule
from trainkit.collectives.schedule import compose, from_dict, link_loads, to_dict
from trainkit.collectives.trees import double_binary_tree_schedule, double_binary_tree_time

F = Fraction
HALVES = [(F(0), F(1, 2)), (F(1, 2), F(1))]
WIRES = {("a", "b"): 1, ("b", "a"): 1}


def pair(collective: str, ops: list[Op], mode: str = "pipelined", **more: object) -> Schedule:
    shards = HALVES if collective in ("allgather", "reduce_scatter") else ()
    return Schedule("pair", collective, ("a", "b"), ops, mode, shards=shards, links=WIRES, unit="GB/s", **more)  # type: ignore[arg-type]


def op(number: int, kind: str, src: int, dst: int, start: Fraction, stop: Fraction, *depends: int, step: int = 0) -> Op:
    return Op(number, kind, src, dst, start, stop, ("ab"[src], "ab"[dst]), depends, step)  # type: ignore[arg-type]


SWAP = [op(0, "send", 0, 1, F(0), F(1, 2)), op(1, "send", 1, 0, F(1, 2), F(1))]
SUM = [
    op(0, "reduce", 0, 1, F(0), F(1)),
    op(1, "send", 1, 0, F(0), F(1), 0),
]


def test_right_schedules_pass() -> None:
    pair("allgather", SWAP).verify()
    pair("allgather", SWAP, "steps").verify()
    pair("allreduce", SUM).verify()
    pair("broadcast", [op(0, "send", 1, 0, F(0), F(1))], root=1).verify()
    pair("reduce", [op(0, "reduce", 0, 1, F(0), F(1))], root=1).verify()
    # A step reads what its sender held when the step began: both sums may cross.
    crossing = [op(0, "reduce", 0, 1, F(0), F(1)), op(1, "reduce", 1, 0, F(0), F(1))]
    pair("allreduce", crossing, "steps").verify()
    with pytest.raises(ScheduleError, match="op 1"):
        pair("allreduce", crossing).verify()


@pytest.mark.parametrize(
    ("collective", "ops", "words"),
    [
        ("allgather", SWAP[:1], r"rank 0 ends with a wrong slice \[1/2, 1\): rank 1's contribution is missing"),
        ("allgather", [op(0, "send", 0, 1, F(1, 2), F(1))], "op 0 .* sends what rank 0 does not hold"),
        ("allreduce", [SUM[0], SUM[1]._replace(depends=())], "op 1 .* does not wait for op 0"),
        ("allreduce", [op(0, "send", 0, 1, F(0), F(1))], "op 0 .* overwrites rank 1's contribution"),
        ("allreduce", [SUM[0], op(1, "reduce", 0, 1, F(0), F(1))], "op 1 .* adds rank 0's contribution a second time"),
        ("reduce_scatter", [op(0, "reduce", 0, 1, F(1, 2), F(1))], "rank 0 ends with a wrong slice"),
        ("allgather", [SWAP[0]._replace(path=("a", "x", "b"))], "a -> x, which is not a link"),
        ("allgather", [SWAP[0]._replace(path=("b", "a"))], "goes from a to b, its path is"),
    ],
)
def test_replay_names_the_first_wrong_op(collective: str, ops: list[Op], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        pair(collective, ops).verify()


def test_orders_that_wait_for_each_other_are_found() -> None:
    with pytest.raises(ScheduleError, match="wait for each other"):
        pair("allgather", SWAP, order=[[0, 1], [1, 0]]).verify()
    with pytest.raises(ScheduleError, match="must name each of its 2 ops once"):
        pair("allgather", SWAP, order=[[0], [0, 1]]).verify()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"collective": "alltoall"}, "one of allgather"),
        ({"mode": "random"}, "one of steps"),
        ({"unit": "km/h"}, "unit must be"),
        ({"shards": HALVES[:1]}, "one shard a rank"),
        ({"collective": "reduce", "shards": ()}, "needs root"),
        ({"ops": [SWAP[1]]}, "ids count from 0"),
        ({"ops": [SWAP[0]._replace(start=F(1, 2))]}, r"a slice lies within \[0, 1\]"),
        ({"ops": [SWAP[0]._replace(dst=2)]}, "ranks must be below 2"),
        ({"ops": [SWAP[0]._replace(dst=0)]}, "a copy stays on one rank"),
        ({"ops": [SWAP[0]._replace(depends=(0,))]}, "must name earlier ops"),
        ({"ops": [SWAP[0]._replace(kind="shout")]}, "kind must be"),
    ],
)
def test_malformed_schedules_are_refused(change: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        replace(pair("allgather", SWAP), **change, order=())  # type: ignore[arg-type]


def test_local_copies() -> None:
    # Rank 1 keeps its input in the upper half and copies it down before it sends.
    ops = [
        Op(0, "copy", 1, 1, F(0), F(1, 4), source=F(1, 2)),
        op(1, "send", 0, 1, F(0), F(1, 2)),
    ]
    with pytest.raises(ScheduleError, match=r"op 1 .* overwrites rank 1"):
        pair("allgather", ops).verify()


def test_clock_of_steps_is_exact() -> None:
    two = pair("allgather", [SWAP[0], SWAP[1]._replace(step=1)], "steps")
    assert two.time(2 * 10**9, alpha=F(1, 10)) == F(2, 10) + 2
    assert pair("allgather", SWAP, "steps").time(2 * 10**9, alpha=F(1, 10)) == F(1, 10) + 1
    slow = replace(two, latency={("a", "b"): 0.5})
    assert slow.time(2 * 10**9) == F(5, 2)
    with pytest.raises(ValueError, match="seconds need a unit"):
        replace(two, unit=None).time(1)


def test_clock_of_pipelines_shares_links_in_order() -> None:
    # Two sends share one link: the second starts when the first has left it, and arrives alpha later.
    ops = [
        op(0, "send", 0, 1, F(0), F(1, 4)),
        op(1, "send", 0, 1, F(1, 4), F(1, 2)),
        op(2, "send", 1, 0, F(1, 2), F(1)),
    ]
    assert pair("allgather", ops).time(4 * 10**9, alpha=F(1, 8)) == 2 + F(1, 8)


def test_clock_of_pipelines_serves_what_comes() -> None:
    # The first op to use the way into c waits for another one, which holds nobody up; those from one rank take turns.
    ops = [
        Op(0, "send", 0, 1, F(0), F(1, 4), ("a", "b")),
        Op(1, "send", 1, 2, F(0), F(1, 4), ("b", "hub", "c"), (0,)),
        Op(2, "send", 0, 2, F(1, 4), F(1, 2), ("a", "hub", "c")),
        Op(3, "send", 0, 2, F(1, 2), F(3, 4), ("a", "hub", "c")),
    ]
    links = dict.fromkeys([("a", "b"), ("a", "hub"), ("b", "hub"), ("hub", "c")], 1)
    schedule = Schedule("late", "broadcast", ("a", "b", "c"), ops, "pipelined", links=links, unit="GB/s", root=0)
    # into c: op 2 in the first second; then op 1 and op 3 have come, and go in this order
    assert schedule.time(4 * 10**9, alpha=0) == 3
    only = replace(schedule, ops=ops[:3], order=())
    assert only.time(4 * 10**9, alpha=F(1, 8)) == 2 + F(2, 8)


def test_ring_is_a_schedule_and_its_clock_is_known() -> None:
    for collective, laps in (("allgather", 1), ("reduce_scatter", 1), ("allreduce", 2)):
        ring = ring_schedule(fabrics.ring(5, 1, unit="GB/s"), collective)
        ring.verify()
        assert ring.time(5 * 10**9, alpha=F(1, 100)) == laps * 4 * (1 + F(1, 100))
    with pytest.raises(ValueError, match="name every compute node once"):
        ring_schedule(fabrics.ring(3), order=["0", "1"])


@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_double_binary_tree_is_a_schedule_that_tends_to_its_bound(size: int) -> None:
    star = fabrics.star([1] * size, unit="GB/s")
    double_binary_tree_schedule(star).verify()
    fine = double_binary_tree_schedule(star, 64)
    fine.verify()
    bound = double_binary_tree_time(star)
    assert bound <= fine.time(10**9, alpha=0) <= bound * F(11, 10)
    with pytest.raises(ValueError, match="chunks"):
        double_binary_tree_schedule(star, 0)


def test_halves_compose() -> None:
    box = fabrics.star([1, 2, 3, 4], unit="GB/s")
    both = compose(forest(box, "reduce_scatter").schedule(2), forest(box).schedule(2))
    both.verify()
    assert both.collective == "allreduce"
    steps = [
        pair("reduce_scatter", [op(0, "reduce", 0, 1, F(1, 2), F(1)), op(1, "reduce", 1, 0, F(0), F(1, 2))], "steps")
    ]
    compose(steps[0], pair("allgather", SWAP, "steps")).verify()
    with pytest.raises(ValueError, match="same mode"):
        compose(steps[0], pair("allgather", SWAP))


def test_copying_switches_carry_a_slice_once() -> None:
    box = replace(fabrics.star([1] * 4), multicast=frozenset({"switch"}))
    trees = forest(box).schedule()
    loads = link_loads(trees)
    assert loads["0", "switch"] == F(1, 4)
    assert loads["switch", "0"] == F(3, 4)


def test_files_keep_everything(tmp_path: Path) -> None:
    trees = forest(fabrics.mi250(1), trees_per_root=2).schedule(3)
    trees.save(tmp_path / "forest.json")
    again = Schedule.load(tmp_path / "forest.json")
    again.verify()
    assert to_dict(again) == to_dict(trees)
    assert list(again.ops) == list(trees.ops)
    assert again.time(10**9) == trees.time(10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["forest.json"]
    data = json.loads((tmp_path / "forest.json").read_text())
    with pytest.raises(ValueError, match="version 1"):
        from_dict(data | {"version": 2})
    (tmp_path / "forest.json").write_text("[")
    with pytest.raises(ValueError, match="not JSON"):
        Schedule.load(tmp_path / "forest.json")


def test_picture() -> None:
    figure = forest(fabrics.dgx_h100(1)).schedule().draw()
    assert figure.axes[0].get_xlabel() == "wave"


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_one_op_less_or_other_is_always_found(data: st.DataObject) -> None:
    whole = forest(fabrics.mesh([2, 3])).schedule(2)
    ops = list(whole.ops)
    victim = data.draw(st.integers(0, len(ops) - 1))
    if data.draw(st.booleans()):
        # Left out: its receiver never gets the slice, or somebody sends what is not there.
        kept = [o for o in ops if o.id != victim]
        number = {o.id: place for place, o in enumerate(kept)}
        broken = [o._replace(id=number[o.id], depends=tuple(number[d] for d in o.depends if d in number)) for o in kept]
    else:
        shift = whole.ops[victim].stop - whole.ops[victim].start
        start = (ops[victim].start + shift) % 1
        broken = [o._replace(start=start, stop=start + shift) if o.id == victim else o for o in ops]
    with pytest.raises(ScheduleError):
        replace(whole, ops=broken, order=()).verify()


def test_what_a_connection_holds_keeps_others_waiting() -> None:
    quarter = [(Fraction(n, 4), Fraction(n + 1, 4)) for n in range(4)]
    ops = [
        *[Op(n, "send", 0, 1, *quarter[n], ("a", "s", "b")) for n in range(3)],
        Op(3, "send", 4, 0, *quarter[3], ("e", "a")),  # comes in after half a second, and is to go on to d
        Op(4, "send", 0, 2, *quarter[3], ("a", "s", "c"), depends=(3,)),
        Op(5, "send", 2, 3, *quarter[3], ("c", "d"), depends=(4,)),
    ]
    links = {("a", "s"): 1, ("s", "b"): 1, ("s", "c"): 1, ("c", "d"): 1, ("e", "a"): 2}
    relayed = Schedule("relayed", "broadcast", tuple("abcde"), ops, "pipelined", links=links, unit="B/s", root=0)
    # it passes the third slice, which has not set out; or no slice, where all three are with the connection
    assert relayed.time(4) == relayed.time(4, held=0) == 4
    assert relayed.time(4, held=2) == relayed.time(4, held=1000) == 5
    # of large slices a connection holds no second one
    assert relayed.time(4 * 10**6, held=2) == 4 * 10**6
