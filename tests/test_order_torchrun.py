"""Planned ranks where they count: torchrun's rendezvous, over restarts and hosts that leave and return; ordered groups."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from order_agents import Agents

pytestmark = pytest.mark.timeout(900)

A, B, C, D = (f"127.0.0.{number}" for number in range(1, 5))
# c10d's own order is by address
PLAN = {"version": 1, "hosts": ["c", B, A], "addresses": {"c": [C]}, "racks": {"c": "r0", D: "r0"}}


@pytest.fixture
def agents(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Agents]:
    nodes, restarts = request.param
    made = Agents(tmp_path, PLAN, nodes=nodes, restarts=restarts)
    yield made
    made.close()


@pytest.mark.parametrize("agents", [("3", 1)], indirect=True)
def test_a_killed_worker_keeps_the_order(agents: Agents) -> None:
    for host in (A, B, C):
        agents.start(host)
    agents.wait(lambda: len(agents.rounds()) == 3)
    assert agents.settled(C, B, A)
    (agents.folder / "kill").write_text(B)
    agents.wait(lambda: len(agents.rounds()) == 6)
    assert agents.settled(C, B, A)
    assert agents.finish() == [0, 0, 0]
    # the workers meet on rank 0's host; an agent that saw others go first counts no restart
    assert {row[4] for row in agents.rounds()} == {C}
    assert "1" in {row[3] for row in agents.rounds()[3:]}


@pytest.mark.slow
@pytest.mark.parametrize("agents", [("2:4", 10)], indirect=True)
def test_a_host_leaves_and_returns_and_a_stranger_joins(agents: Agents) -> None:
    for host in (A, B, C):
        agents.start(host)
    agents.wait(lambda: agents.settled(C, B, A))
    agents.leave(C)
    agents.wait(lambda: agents.settled(B, A))
    agents.start(C)
    agents.wait(lambda: agents.settled(C, B, A))
    # not among the hosts of the plan, but its rack is known: behind c
    agents.start(D)
    agents.wait(lambda: agents.settled(C, D, B, A))
    assert agents.finish() == [0, 0, 0, 0]


def test_an_ordered_group(tmp_path: Path) -> None:
    code = f"""
import sys, torch, torch.distributed as dist
from trainkit.collectives.order import OrderError, ordered_group
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://{tmp_path}/store", rank=rank, world_size=2)
group = ordered_group([1, 0])
assert dist.get_rank(group) == 1 - rank
parts = [torch.zeros(1), torch.zeros(1)]
dist.all_gather(parts, torch.tensor([float(rank)]), group=group)
assert torch.cat(parts).tolist() == [1.0, 0.0]
try:
    ordered_group([1, 1])
except OrderError as error:
    print(error)
dist.barrier()
dist.destroy_process_group()
"""
    started = [
        subprocess.Popen([sys.executable, "-c", code, str(rank)], stdout=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for process in started:
        assert "each of the hosts 0 to 1 once, got [1, 1]" in process.communicate(timeout=200)[0]
        assert process.returncode == 0
