"""The planned rendezvous over a store in this process: whose plan counts, who is missing, what is refused."""

import json
import logging
import threading
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed.elastic.rendezvous import (
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    RendezvousTimeoutError,
)
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from trainkit.collectives.order import Arrival, OrderError, RankPlan
from trainkit.collectives.order._rendezvous import _PlannedRendezvous, planned_rendezvous


class Inner:
    """A c10d rendezvous that is complete at once, with ranks by arrival."""

    use_agent_store = True

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.store, self.rank, self.size, self.round = store, rank, size, 0

    def next_rendezvous(self) -> RendezvousInfo:
        self.round += 1
        store = dist.PrefixStore(f"round{self.round}", self.store)
        return RendezvousInfo(store, self.rank, self.size, RendezvousStoreInfo("127.0.0.1", 1))


def meet(plans: Sequence[RankPlan], hosts: Sequence[str], *, size: int | None = None, seconds: float = 20) -> list[Any]:
    """What every host gets: (rank, master port), or its error."""
    store = dist.HashStore()
    got: list[Any] = [None] * len(hosts)

    def join(number: int) -> None:
        inner: Any = Inner(store, number, size or len(hosts))
        me = Arrival((hosts[number],))
        handler = _PlannedRendezvous(inner, plans[number], me, "127.0.0.1", timedelta(seconds=seconds))
        try:
            for _ in range(2):  # twice: a second round must not find the first one's store
                info = handler.next_rendezvous()
                assert info.bootstrap_store_info is not None
                earlier, got[number] = got[number], (info.rank, info.bootstrap_store_info.master_port, handler)
                assert earlier is None or (
                    earlier[0] == info.rank and earlier[1] != info.bootstrap_store_info.master_port
                )
        except Exception as error:
            got[number] = error

    threads = [threading.Thread(target=join, args=(number,)) for number in range(len(hosts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return got


def test_ranks_follow_the_plan() -> None:
    got = meet([RankPlan(["c", "a", "b"])] * 3, ["a", "b", "c"])
    assert [one[0] for one in got] == [1, 2, 0]
    assert len({one[1] for one in got}) == 1


def test_the_plan_that_most_hosts_hold(caplog: pytest.LogCaptureFixture) -> None:
    new, old = RankPlan(["c", "b", "a"]), RankPlan(["a", "b", "c"])
    with caplog.at_level(logging.WARNING):
        got = meet([old, new, new, new], ["a", "b", "c", "x"])
    assert [one[0] for one in got] == [2, 1, 0, 3]
    assert "hold another plan of ranks, which is not followed: a" in caplog.text
    assert "not in the plan of ranks: x" in caplog.text


def test_a_host_that_never_says_its_name(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        got = meet([RankPlan(["a", "b"])] * 2, ["a", "b"], size=3, seconds=0.2)
    assert all(isinstance(one, RendezvousTimeoutError) for one in got)
    assert "is a host restarting?" in str(got[0])
    assert "did not all say their names" in caplog.text


def parameters(tmp_path: Path, **more: Any) -> RendezvousParameters:
    options = {"store_type": "file", **more}
    return RendezvousParameters("trainkit", str(tmp_path / "store"), "job", 1, 1, "10.0.0.7", **options)


def test_one_host_on_torchs_own_rendezvous(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps({"version": 1, "hosts": ["a"], "addresses": {"a": ["10.0.0.7"]}}))
    handler = planned_rendezvous(parameters(tmp_path, plan=str(tmp_path / "plan.json"), order_timeout="5"))
    assert (handler.get_backend(), handler.get_run_id(), handler.is_closed()) == ("trainkit", "job", False)
    assert handler.num_nodes_waiting() == 0
    handler.set_closed()
    assert handler.is_closed()


def test_without_a_plan_there_is_no_rendezvous(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OrderError, match=r"no plan of ranks rank_order\.json: name one with --rdzv-conf plan=FILE"):
        planned_rendezvous(parameters(tmp_path))
    (tmp_path / "rank_order.json").write_text("{}")
    with pytest.raises(OrderError, match="must be a plan of ranks of version 1"):
        planned_rendezvous(parameters(tmp_path))


def test_torchrun_finds_the_plug_in() -> None:
    """Where the installed package is as new as pyproject.toml."""
    from importlib.metadata import entry_points

    if "trainkit" not in entry_points(group="torchrun.handlers").names:
        pytest.skip("installed before the entry point was there: install again")
    with pytest.raises(FileNotFoundError):
        get_rendezvous_handler(RendezvousParameters("trainkit", "x", "job", 1, 1, plan="/nowhere/plan.json"))
