"""SwitchMLStrategy under Lightning, with real processes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainkit.switchml import SoftwareSwitch

_TRAIN = """
import json, os, sys
import torch, pytorch_lightning as pl
from lightning_fabric.plugins.environments import LightningEnvironment
from trainkit import SwitchMLStrategy
torch.set_num_threads(1)

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1))
    def training_step(self, batch, index):
        if index == 3 and os.environ.get("DIE_AT_STEP_3") == os.environ["LOCAL_RANK"]:
            os.kill(os.getpid(), 9)
        return (self.net(batch) - batch.sum(1, keepdim=True)).square().mean()
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

pl.seed_everything(0, verbose=False)
data = torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=4)
strategy = SwitchMLStrategy(sys.argv[1], deadline_s=float(sys.argv[2]), cluster_environment=LightningEnvironment())
trainer = pl.Trainer(accelerator="cpu", devices=2, strategy=strategy, max_epochs=1, logger=False,
                     enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
net = Net()
trainer.fit(net, data)
flat = torch.cat([p.detach().flatten() for p in net.parameters()])
print(json.dumps({"bits": flat.view(torch.int32).tolist(), **strategy.counters()}), flush=True)
"""


def _start(folder: Path, switch: str, deadline: float = 10.0, **extra: str) -> list["subprocess.Popen[str]"]:
    script = folder / "train.py"
    script.write_text(_TRAIN)
    port = str(20000 + os.getpid() % 20000)
    return [
        subprocess.Popen(
            [sys.executable, str(script), switch, str(deadline)],
            env={**os.environ, "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def test_hook_is_called_on_cpu_and_ranks_end_bit_equal(tmp_path: Path) -> None:
    with SoftwareSwitch() as switch:
        ended = [process.communicate(timeout=240) for process in _start(tmp_path, switch.address)]
    results = [json.loads(out.strip().splitlines()[-1]) for out, _ in ended]
    assert results[0]["bits"] == results[1]["bits"]
    # 8 steps of 4 on each of 2 ranks, one bucket
    assert [result["hook_calls"] for result in results] == [8, 8]
    assert results[0]["buckets"] == 8
    assert results[0]["retransmissions"] <= 2


def test_killed_worker_is_named_on_the_surviving_rank(tmp_path: Path) -> None:
    with SoftwareSwitch() as switch:
        survivor, killed = _start(tmp_path, switch.address, deadline=2.0, DIE_AT_STEP_3="1")
        _, errors = survivor.communicate(timeout=240)
        killed.communicate(timeout=60)
    assert killed.returncode == -9
    assert survivor.returncode != 0
    assert "WorkerMissing" in errors and "rank 1" in errors


def test_unreachable_switch_is_named_on_every_rank(tmp_path: Path) -> None:
    for process in _start(tmp_path, "127.0.0.1:9", deadline=2.0):
        _, errors = process.communicate(timeout=240)
        assert process.returncode != 0
        assert "SwitchUnreachable" in errors and "127.0.0.1:9" in errors


@pytest.mark.parametrize("switch", ["nowhere", "host:", "host:99999", ":80"])
def test_malformed_address_is_refused_before_anything_starts(switch: str) -> None:
    from trainkit import SwitchMLStrategy

    with pytest.raises(ValueError, match="switch is host:port"):
        SwitchMLStrategy(switch)
