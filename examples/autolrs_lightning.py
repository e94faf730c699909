"""AutoLRS on a Lightning Trainer: one line more, no learning rate chosen by hand.

Run: python examples/autolrs_lightning.py
"""

import pytorch_lightning as pl
import torch

from trainkit import AutoLRS


class Classifier(pl.LightningModule):
    """A small network on random clusters."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.ReLU(), torch.nn.Linear(64, 4))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross entropy of a batch."""
        loss = torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """The rate given here does not matter: with one group, not even its size."""
        return torch.optim.AdamW(self.parameters(), lr=1e-9)


def main() -> None:
    """Trains, prints what was found, writes lr.json and lr.png."""
    pl.seed_everything(0)
    centres = torch.randn(4, 16)
    labels = torch.randint(0, 4, (4096,))
    data = torch.utils.data.TensorDataset(centres[labels] + 1.5 * torch.randn(4096, 16), labels)
    auto = AutoLRS(count="all")
    trainer = pl.Trainer(max_steps=400, callbacks=[auto], accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.fit(Classifier(), torch.utils.data.DataLoader(data, 64, shuffle=True))
    for stage in auto.history.stages:
        kind = "annealed from" if stage.anneal else "at"
        print(f"steps {stage.start} to {stage.start + stage.steps}: {kind} {stage.rate:.2e}")
    print(f"{auto.history.kept_steps} steps kept, {auto.history.discarded_steps} discarded")
    auto.schedule.save("lr.json")
    auto.plot().savefig("lr.png")


if __name__ == "__main__":
    main()
