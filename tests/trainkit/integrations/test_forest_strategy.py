"""ForestStrategy under Lightning, with real processes."""

from pathlib import Path
from typing import Any

import pytest
from execute_ranks import processes
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_ranks import Net, fit

from trainkit import ForestStrategy
from trainkit.collectives import PeerLost, Schedule, ScheduleError, Topology, ring_schedule


class Counted(Net):
    counted: dict[str, int]

    def on_train_end(self) -> None:
        self.counted = self.trainer.strategy.forest_state.counters()  # type: ignore[attr-defined]


def _train(rank: int, what: dict[str, Any], dies: int) -> tuple[list[int], int] | tuple[str, int]:
    strategy = ForestStrategy(**what, timeout_s=10.0, cluster_environment=LightningEnvironment())
    try:
        bits, net = fit(strategy, lambda: Counted(dies == rank))
    except PeerLost as error:
        return str(error), error.rank
    return bits, net.counted["sent_bytes"]


@pytest.fixture
def pair(tmp_path: Path) -> Topology:
    """Two nodes; their network and its ring are in files, too."""
    made = Topology("pair", list("ab"), list("ab"), [("a", "b", 1), ("b", "a", 1)])
    made.save(tmp_path / "pair.json")
    ring_schedule(made).save(tmp_path / "ring.json")
    return made


@pytest.mark.parametrize(("what", "file"), [("topology", "pair.json"), ("schedule", "ring.json")])
def test_gradients_follow_the_network(tmp_path: Path, pair: Topology, what: str, file: str) -> None:
    results = processes(_train, 2, {what: str(tmp_path / file)}, -1, backend="", deadline_s=200)
    assert results[0][0] == results[1][0]  # the same bits
    assert results[0][1] > 8 * 577 * 4  # 8 steps of one bucket each


def test_killed_rank_is_named_on_the_surviving_one(pair: Topology) -> None:
    results = processes(_train, 2, {"topology": pair}, 1, backend="", deadline_s=200, expect=1)
    told, culprit = results[0]
    assert culprit == 1 and "rank 1 closed its connection" in str(told)


def test_wrong_arguments_are_told_before_anything_starts(pair: Topology) -> None:
    with pytest.raises(ValueError, match="either the schedule to run or the topology"):
        ForestStrategy()
    whole = ring_schedule(pair)
    with pytest.raises(ScheduleError):
        ForestStrategy(schedule=Schedule("cut short", "allreduce", whole.ranks, list(whole.ops)[:-1], whole.mode))
