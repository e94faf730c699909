"""Time inside AutoLRS's hooks over kept steps, and the time of one decision (forecast and Gaussian process).

Run: python benchmarks/autolrs/overhead.py
"""

import logging
import time
import warnings

import numpy as np
import pytorch_lightning as pl
import torch

from trainkit import AutoLRS
from trainkit.autolrs import LRSearch, forecast

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Timed(AutoLRS):
    """Adds up the time in the per-batch hooks, those that search left out."""

    spent, calls = 0.0, 0

    def on_train_batch_start(self, *args: object) -> None:
        trials, began = len(self.history.trials), time.perf_counter()
        super().on_train_batch_start(*args)
        if len(self.history.trials) == trials:
            Timed.spent += time.perf_counter() - began

    def on_train_batch_end(self, *args: object) -> None:
        began = time.perf_counter()
        super().on_train_batch_end(*args)
        Timed.spent += time.perf_counter() - began
        Timed.calls += 1


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


def main() -> None:
    torch.set_num_threads(1)
    data = torch.utils.data.TensorDataset(torch.randn(16_000, 256), torch.randint(0, 10, (16_000,)))
    callback = Timed()
    quiet = {
        "enable_progress_bar": False,
        "logger": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_steps=1000, accelerator="cpu", callbacks=[callback], **quiet)
    began = time.perf_counter()
    trainer.fit(Net(), torch.utils.data.DataLoader(data, 128))
    kept = time.perf_counter() - began - callback.history.search_seconds
    print(f"hooks: {Timed.spent:.3f} s of {kept:.2f} s over {Timed.calls} kept steps, {100 * Timed.spent / kept:.2f} %")
    losses = np.exp(-np.arange(100) / 30) + 0.05 * np.random.default_rng(0).standard_normal(100)
    began = time.perf_counter()
    for _ in range(50):
        forecast(losses, 1000)
    print(f"forecast of 100 losses: {(time.perf_counter() - began) / 50 * 1e3:.2f} ms")
    search = LRSearch(1e-5, 1.0)
    for i in range(9):
        search.tell(search.ask(), 1.0 + 0.1 * i, 0.05)
    began = time.perf_counter()
    for _ in range(20):
        search.ask()
    print(f"ask after 9 trials: {(time.perf_counter() - began) / 20 * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
