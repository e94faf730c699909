"""Messages between two ranks of the backend: in order, side by side, and never another one's."""

import itertools

import pytest
import torch
import torch.distributed as dist
from execute_ranks import processes

from trainkit.collectives import ExecutionError, Topology, register_backend

SIZE = 3


def _backend(timeout_s: float) -> None:
    names = [f"n{rank}" for rank in range(SIZE)]
    links = [(u, v, 1) for u, v in itertools.permutations(names, 2)]
    register_backend(Topology("clique", names, names, links), timeout_s=timeout_s)
    dist.init_process_group("trainkit")


def _many(rank: int) -> None:
    _backend(20)
    left, right = (rank - 1) % SIZE, (rank + 1) % SIZE
    sent = [torch.full((n,), 100.0 * rank + n) for n in range(1, 30)]
    taken = [torch.zeros(n) for n in range(1, 30)]
    # all in flight; the sends are waited for first, and every second tag is taken in the other order
    receives = [dist.irecv(one, left, tag=at % 2) for at, one in enumerate(taken) if at % 2]
    receives += [dist.irecv(one, left, tag=at % 2) for at, one in enumerate(taken) if not at % 2]
    for work in [dist.isend(one, right, tag=at % 2) for at, one in enumerate(sent)] + receives:
        work.wait()
    for n, one in enumerate(taken, 1):
        assert one.tolist() == [100.0 * left + n] * n
    ops = [
        dist.P2POp(dist.isend, torch.tensor([rank]), right),
        dist.P2POp(dist.irecv, mine := torch.tensor([-1]), left),
    ]
    for work in dist.batch_isend_irecv(ops):
        work.wait()
    assert mine.item() == left
    if rank == 0:
        heard = {}
        for _ in range(2 * (SIZE - 1)):
            value = torch.zeros(4, dtype=torch.complex64)
            heard.setdefault(dist.recv(value), []).append(value[0].real.item())
        assert heard == {1: [1.0, 11.0], 2: [2.0, 12.0]}
    else:
        dist.send(torch.full((4,), rank, dtype=torch.complex64), 0)
        dist.send(torch.full((4,), rank + 10, dtype=torch.complex64), 0)
    with pytest.raises(ValueError, match="contiguous"):
        dist.send(torch.zeros(4, 4).T, right)
    with pytest.raises(ValueError, match="from 0 to 1073741823, got 1073741824"):
        dist.send(torch.zeros(4), right, tag=1 << 30)
    dist.barrier()
    dist.destroy_process_group()


def test_messages_arrive_in_order_and_side_by_side() -> None:
    processes(_many, SIZE, backend="")


def _mismatched(rank: int) -> dict[str, str]:
    """Gloo takes the first two as they come, and aborts the process at the third."""
    _backend(2)
    store = dist.distributed_c10d._get_default_store()
    seen = {}
    for name, sent in {
        "dtype": torch.ones(4, dtype=torch.int32), "shorter": torch.ones(3), "longer": torch.ones(5)
    }.items():  # fmt: skip
        group = dist.new_group([0, 1])
        if rank < 2:
            taken = torch.zeros(4)
            with pytest.raises(ExecutionError, match="rank 0 sent") as raised:
                dist.send(sent, 1, group) if rank == 0 else dist.recv(taken, 0, group)
            assert not taken.any()
            seen[name] = str(raised.value)
            store.set(f"{name}/{rank}", "")
            store.wait([f"{name}/{1 - rank}"])
    return seen


def test_what_was_sent_otherwise_is_not_received() -> None:
    results = processes(_mismatched, SIZE, backend="")
    assert results[1] == {
        "dtype": "rank 0 sent 4 elements of torch.int32, rank 1 receives 4 of torch.float32: both must be the same",
        "shorter": "rank 0 sent 3 elements of torch.float32, rank 1 receives 4 of torch.float32: both must be the same",
        "longer": "rank 0 sent 5 elements of torch.float32, rank 1 receives 4 of torch.float32: both must be the same",
    }
    assert results[0] == {name: f"{words}, as rank 1 saw" for name, words in results[1].items()}
