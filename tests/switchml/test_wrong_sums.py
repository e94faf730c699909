"""What once gave a wrong sum without a word: other jobs, other groups, other types, other sizes; and what once grew."""

from typing import Any

import pytest
import torch
import torch.distributed as dist
from execute_ranks import processes
from switchml_ends import joined, together
from torch.nn.parallel import DistributedDataParallel

from trainkit.switchml import SoftwareSwitch, SwitchMLState, switchml_hook


def _job(rank: int, switch: str, value: float) -> list[float]:
    state = SwitchMLState(switch, timeout_s=20)
    got = [state.average(torch.full((100,), value + rank)).wait()[0].item() for _ in range(20)]
    state.close()
    return got


def test_two_jobs_with_one_sessions_name_get_their_own_averages() -> None:
    with SoftwareSwitch() as switch:
        both = together(*(lambda v=v: processes(_job, 2, switch.address, v) for v in (1.0, 1000.0)))
    assert [result[rank] for result in both for rank in range(2)] == [[1.5] * 20] * 2 + [[1000.5] * 20] * 2


def _groups(rank: int, switch: str) -> dict[str, Any]:
    """Ranks 0 and 1, ranks 2 and 3 in groups of their own."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    told: dict[str, Any] = {}
    for name, group in (("right", halves[rank // 2]), ("wrong", None)):
        model = torch.nn.Linear(16, 1, bias=False)
        ddp = DistributedDataParallel(model, process_group=halves[rank // 2])
        state = SwitchMLState(switch, process_group=group, timeout_s=20)
        ddp.register_comm_hook(state, switchml_hook)
        try:
            ddp(torch.full((1, 16), float(rank + 1))).sum().backward()
            told[name] = model.weight.grad[0, 0].item()  # type: ignore[index]
        except (RuntimeError, ValueError) as error:
            told[name] = str(error)
        state.close()
        del ddp
        dist.barrier()
    # a fallback's process group is of these ranks, too
    state = SwitchMLState(switch, process_group=halves[rank // 2], fallback="allreduce", timeout_s=20)
    told["fallback"] = state.average(torch.full((10,), float(rank))).wait()[0].item()
    state.close()
    return told


def test_a_state_averages_over_its_process_group_and_refuses_another_than_ddps() -> None:
    with SoftwareSwitch() as switch:
        told = processes(_groups, 4, switch.address)
    for rank in range(4):
        assert told[rank]["right"] == (1.5 if rank < 2 else 3.5)
        assert "give both the same process_group" in told[rank]["wrong"]
        assert told[rank]["fallback"] == (0.5 if rank < 2 else 2.5)


def _models(rank: int, switch: str, shared: bool, wire: Any) -> list[Any]:
    """Two models trained by turns, as a GAN's; alike in their buckets, unlike in their gradients."""
    models = [torch.nn.Linear(8, 4, bias=False) for _ in range(2)]
    states = [SwitchMLState(switch, wire=wire, timeout_s=20) for _ in range(1 if shared else 2)]
    wrapped = []
    for number, model in enumerate(models):
        torch.nn.init.ones_(model.weight)
        wrapped.append(DistributedDataParallel(model))
        wrapped[-1].register_comm_hook(states[-1 if shared else number], switchml_hook)
    total = [torch.zeros(4, 8) for _ in models]
    for _ in range(40):
        for number, ddp in enumerate(wrapped):
            ddp(torch.linspace(0.1, 1, 8).repeat(1, 1) * (rank + 1) * (1000.0 if number else 1.0)).sum().backward()
            total[number] += models[number].weight.grad  # type: ignore[arg-type]
            ddp.zero_grad()
    for state in states:
        state.close()
    return [t[0].tolist() for t in total]


@pytest.mark.parametrize(("shared", "wire"), [(False, "int32"), (True, "int8")])
def test_two_models_keep_their_sums_and_their_rounding_errors_apart(shared: bool, wire: str) -> None:
    with SoftwareSwitch() as switch:
        told = processes(_models, 2, switch.address, shared, wire)
    exact = 40 * 1.5 * torch.linspace(0.1, 1, 8)
    for number, scale in enumerate((1.0, 1000.0)):
        for rank in range(2):
            torch.testing.assert_close(torch.tensor(told[rank][number]) / scale, exact, rtol=0.002, atol=0.02)
        assert told[0][number] == told[1][number]


def _types(rank: int, switch: str) -> dict[str, Any]:
    state = SwitchMLState(switch, timeout_s=20)
    values = torch.tensor([1 + 1e-9, 1e300, 1e-60, float(rank)], dtype=torch.float64)
    told: dict[str, Any] = {"float64": state.average(values).wait().tolist()}
    model = torch.nn.Embedding(50, 8, sparse=True)
    ddp = DistributedDataParallel(model)
    ddp.register_comm_hook(state, switchml_hook)
    try:
        ddp(torch.tensor([rank, 7])).sum().backward()
    except (RuntimeError, ValueError) as error:
        told["sparse"] = str(error)
    state.close()
    return told


def test_float64_is_not_rounded_and_sparse_gradients_are_refused() -> None:
    with SoftwareSwitch() as switch:
        told = processes(_types, 2, switch.address)
        state = SwitchMLState(switch.address, rank=0, world_size=1)
        for dtype in (torch.float64, torch.int32, torch.complex64):
            with pytest.raises(ValueError, match="float"):
                state.average(torch.ones(4, dtype=dtype))
        state.close()
    for rank in range(2):
        assert told[rank]["float64"] == [1 + 1e-9, 1e300, 1e-60, 0.5]
        assert "sparse=False" in told[rank]["sparse"]


@pytest.mark.parametrize(
    "sizes",
    [([100], [300]), ([64 * 25, 64 * 30], [64 * 30, 64 * 25]), ([64, 128], [128, 64]), ([0, 64], [64, 0])],
)
def test_buckets_of_other_sizes_are_named_and_give_no_sum(sizes: tuple[list[int], list[int]]) -> None:
    with SoftwareSwitch() as switch:
        states = joined(switch.address, 2, elements=64, slots=8)

        def work(rank: int) -> list[Any]:
            ended: list[Any] = []
            for future in [
                states[rank].average(torch.full((n,), float(rank + 1 + i))) for i, n in enumerate(sizes[rank])
            ]:
                try:
                    ended.append(future.wait())
                except RuntimeError as error:
                    ended.append(str(error))
            return ended

        ended = together(*(lambda r=r: work(r) for r in range(2)))
        words = [one for rank in ended for one in rank if isinstance(one, str)]
        assert words and all("same sizes in the same order" in one for one in words), ended
        averages = [one for rank in ended for one in rank if not isinstance(one, str)]
        # what was averaged before the ranks parted is right
        assert all(torch.equal(one, torch.full_like(one, 1.5)) for one in averages if one.numel())
        together(*(state.close for state in states))


@pytest.mark.parametrize("thousands", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_nothing_grows_over_two_hundred_thousand_buckets(thousands: int) -> None:
    with SoftwareSwitch(threads=2) as switch:
        state = SwitchMLState(switch.address, rank=0, world_size=1, elements=64)
        link: Any = state.connect()
        value = torch.ones(8).numpy()
        for number in range(thousands):
            futures = [link.submit(value, value, None, (number + i) % 5000) for i in range(1000)]
            for future in futures:
                future.result()
            assert len(link._parts) <= 1000 + 2 * link.member.slots
        ends = [len(one._ends) for one in link._links]
        known = [len(one._known) for one in link._links]
        assert max(ends) <= 1000 + 2 * link.member.slots and max(known) <= 4096
        assert link.counters()["buckets"] == 1000 * thousands
        state.close()
