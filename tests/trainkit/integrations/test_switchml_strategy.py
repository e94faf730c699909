"""SwitchMLStrategy under Lightning, with real processes."""

import pytest
import torch
from execute_ranks import processes
from lightning_fabric.plugins.environments import LightningEnvironment
from lightning_ranks import Net, fit
from pytorch_lightning.strategies import DDPStrategy

from trainkit import SwitchMLStrategy
from trainkit.switchml import SoftwareSwitch


def _train(rank: int, switch: str, timeout_s: float, dies: int) -> tuple[list[int], dict[str, int]] | str:
    """Bits of the parameters and the counters, or the error that ended the training."""
    strategy = SwitchMLStrategy(switch, timeout_s=timeout_s, cluster_environment=LightningEnvironment())
    try:
        return fit(strategy, lambda: Net(dies == rank))[0], strategy.counters()
    except Exception as error:
        return repr(error)


def test_hook_is_called_on_cpu_and_ranks_end_bit_equal() -> None:
    with SoftwareSwitch() as switch:
        results = processes(_train, 2, switch.address, 10.0, -1, backend="")
    assert results[0][0] == results[1][0]
    # 8 steps of 4 on each of 2 ranks, one bucket
    assert [counters["hook_calls"] for _, counters in results.values()] == [8, 8]
    assert results[0][1]["buckets"] == 8
    assert results[0][1]["retransmissions"] <= 2


def test_killed_worker_is_named_on_the_surviving_rank() -> None:
    with SoftwareSwitch() as switch:
        results = processes(_train, 2, switch.address, 2.0, 1, backend="", expect=1)
    assert "WorkerMissing" in results[0] and "rank 1" in results[0]


def test_unreachable_switch_is_named_on_every_rank() -> None:
    for error in processes(_train, 2, "127.0.0.1:9", 2.0, -1, backend="").values():
        assert "SwitchUnreachable" in error and "127.0.0.1:9" in error


def _alone(rank: int, switch: str) -> tuple[list[int], list[int], float]:
    """Bits of the parameters with the switch, and by plain DDP; calls of the hook."""
    strategy = SwitchMLStrategy(switch, timeout_s=5.0, cluster_environment=LightningEnvironment())
    ours = fit(strategy, lambda: Net(False), devices=1)[0]
    plain = fit(DDPStrategy(cluster_environment=LightningEnvironment()), lambda: Net(False), devices=1)[0]
    return ours, plain, strategy.counters()["hook_calls"]


def test_one_rank_trains_as_plain_ddp_does() -> None:
    """As one does to find a fault."""
    with SoftwareSwitch() as switch:
        ((ours, plain, calls),) = processes(_alone, 1, switch.address, backend="").values()
    ours, plain = (torch.tensor(bits, dtype=torch.int32).view(torch.float32) for bits in (ours, plain))
    assert calls == 16
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-6)  # through the switch's int32


@pytest.mark.parametrize("switch", ["nowhere", "host:", "host:99999", ":80"])
def test_malformed_address_is_refused_before_anything_starts(switch: str) -> None:
    with pytest.raises(ValueError, match="switch is host:port"):
        SwitchMLStrategy(switch)
