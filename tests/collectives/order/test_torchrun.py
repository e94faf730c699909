"""Planned ranks where they count: torchrun's rendezvous, over restarts and hosts that leave and return; ordered groups."""

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from execute_ranks import processes
from order_agents import Agents

from trainkit.collectives.order import OrderError, ordered_group

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


def _called(port: int, strangers: contextlib.ExitStack, noise: bytes = b"") -> bool:
    """Whether somebody listens there; the connection stays."""
    try:
        caller = strangers.enter_context(socket.create_connection(("127.0.0.1", port)))
    except ConnectionRefusedError:
        return False
    caller.sendall(noise)
    return True


@pytest.mark.parametrize("agents", [("3", 1)], indirect=True)
def test_a_killed_worker_keeps_the_order(agents: Agents) -> None:
    """And strangers at the rendezvous port disturb nobody."""
    agents.start(A)
    with contextlib.ExitStack() as strangers:
        agents.wait(lambda: _called(agents.port, strangers))
        for noise in (b"", b"GET / HTTP/1.0\r\n\r\n", b"\xff" * 64) * 7:
            assert _called(agents.port, strangers, noise)
        agents.start(B)
        agents.start(C)
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


def _ordered(rank: int) -> tuple[list[float], str]:
    group = ordered_group([1, 0])
    assert dist.get_rank(group) == 1 - rank
    parts = [torch.zeros(1), torch.zeros(1)]
    dist.all_gather(parts, torch.tensor([float(rank)]), group=group)
    with pytest.raises(OrderError) as refused:
        ordered_group([1, 1])
    dist.barrier()
    return torch.cat(parts).tolist(), str(refused.value)


def test_an_ordered_group() -> None:
    for parts, refusal in processes(_ordered, 2).values():
        assert parts == [1.0, 0.0]
        assert "each of the hosts 0 to 1 once, got [1, 1]" in refusal
