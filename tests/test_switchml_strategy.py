"""SwitchMLStrategy under Lightning, with real processes."""

import os
import signal

import pytest
import pytorch_lightning as pl
import torch
from execute_ranks import processes
from lightning_fabric.plugins.environments import LightningEnvironment

from trainkit import SwitchMLStrategy
from trainkit.switchml import SoftwareSwitch


class Net(pl.LightningModule):
    def __init__(self, dies: bool) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
        self.dies = dies

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        if index == 3 and self.dies:
            os.kill(os.getpid(), signal.SIGKILL)
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def _train(rank: int, switch: str, deadline_s: float, dies: int) -> tuple[list[int], dict[str, int]] | str:
    """Bits of the parameters and the counters, or the error that ended the training."""
    pl.seed_everything(0, verbose=False)
    data = torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=4)
    strategy = SwitchMLStrategy(switch, deadline_s=deadline_s, cluster_environment=LightningEnvironment())
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    net = Net(dies == rank)
    try:
        trainer.fit(net, data)
    except Exception as error:
        return repr(error)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    return flat.view(torch.int32).tolist(), strategy.counters()


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


@pytest.mark.parametrize("switch", ["nowhere", "host:", "host:99999", ":80"])
def test_malformed_address_is_refused_before_anything_starts(switch: str) -> None:
    with pytest.raises(ValueError, match="switch is host:port"):
        SwitchMLStrategy(switch)
