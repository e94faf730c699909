"""A small training under a Lightning strategy, as one rank of a test."""

import os
import signal
from typing import Any

import pytorch_lightning as pl
import torch

# What DDP imports at its first step, for the process that ranks are forked from.
import torch._dynamo
import torch.nn.parallel


class Net(pl.LightningModule):
    """A regression; the rank that `dies` kills itself in its fourth step."""

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


def fit(strategy: Any, make: Any, devices: int = 2) -> tuple[list[int], Any]:
    """Train what `make` returns for 16 steps shared out over the ranks: (bits of its parameters, it)."""
    pl.seed_everything(0, verbose=False)
    data = torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    net = make()
    trainer.fit(net, data)
    return torch.cat([p.detach().flatten() for p in net.parameters()]).view(torch.int32).tolist(), net
