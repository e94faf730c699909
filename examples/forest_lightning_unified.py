"""A small network under the package `lightning` on 8 CPU processes, its gradients summed along the trees of a network.

python examples/forest_lightning_unified.py examples/forest_two_islands.json
"""

import sys

import lightning as L
import torch

from trainkit.lightning import ForestStrategy


class Regression(L.LightningModule):
    """Learns the sum of its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(32, 256), torch.nn.GELU(), torch.nn.Linear(256, 1))

    def training_step(self, batch: torch.Tensor) -> torch.Tensor:
        """Mean squared error."""
        loss = (self.layers(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


if __name__ == "__main__":
    strategy = ForestStrategy(topology=sys.argv[1] if len(sys.argv) > 1 else "examples/forest_two_islands.json")
    devices = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    trainer = L.Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=2, logger=False, enable_checkpointing=False
    )
    trainer.fit(Regression(), torch.utils.data.DataLoader(torch.randn(4096, 32), batch_size=64))
    print(strategy.counters())
