"""Time inside AutoLRS's hooks over kept steps, and the time of one decision (forecast and Gaussian process).

Decisions in processor time of one thread, which other work on the machine lengthens less than it does the clock's; hooks
by the clock, for asking for the processor time takes a system call of 3 to 15 us, and the hooks of a step little more: run
it with nothing beside it. The clock's own share, measured in the same places, is printed, and the hooks' share once more
with every call that took over a millisecond counted as a median one: those are other processes' turns, at any step.

Run: python benchmarks/autolrs/overhead.py
"""

import logging
import math
import time
import warnings
from typing import TypeVar

import numpy as np
import pytorch_lightning as pl
import torch

from trainkit import AutoLRS
from trainkit.autolrs import LRSearch, forecast
from trainkit.autolrs._plan import Search
from trainkit.autolrs._prior import default_prior
from trainkit.autolrs._race import Ground, Losses, race
from trainkit.autolrs.strategies import Bayesian, Situation

T = TypeVar("T")

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)


class Timed(AutoLRS):
    """Notes the time in the per-batch hooks, that of searches apart."""

    def __init__(self) -> None:
        super().__init__()
        self.starts: list[float] = []
        self.ends: list[float] = []
        self.empty: list[float] = []
        self.searched = 0.0

    def on_train_batch_start(self, *args: object) -> None:
        trials, began = len(self.history.trials), time.perf_counter()
        super().on_train_batch_start(*args)
        took = time.perf_counter() - began
        if len(self.history.trials) == trials:
            self.starts.append(took)
        else:
            self.searched += took

    def on_train_batch_end(self, *args: object) -> None:
        before = time.perf_counter()
        began = time.perf_counter()
        super().on_train_batch_end(*args)
        self.ends.append(time.perf_counter() - began)
        self.empty.append(began - before)


class Net(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Linear(256, 512), torch.nn.GELU(), torch.nn.Linear(512, 10))

    def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), 1e-3)


class Free:
    """Trials that cost nothing: what a search of them takes is the time of its decisions."""

    averaged = True

    def restart(self) -> Losses:
        self.at = 0
        return Losses((0,), (1.0,))

    def advance(self, rates: list[float]) -> Losses:
        steps = range(self.at + 1, self.at + len(rates) + 1)
        self.at += len(rates)
        return Losses(tuple(steps), tuple(0.2 + 0.8 * math.exp(-30 * rates[0] * s) for s in steps))

    def keep(self) -> None:
        pass

    def agree(self, value: T) -> T:
        return value


def decisions() -> None:
    """Processor time of a whole search by trial: forecasts, Gaussian process and all."""
    at = Situation(False, 0.1, 2.0, 1.0, 700.0, 900, 900, 64, 1e-3, 1e-3, 1e-3)
    strategy = Bayesian(default_prior(), at, [], [], 1e-5, 1.0, True)
    began = time.process_time()
    outcome = race(Free(), strategy, Search(100, 1000, 64, 5, 10_000), Ground(0, lambda rate, step: rate))
    spent, trials = time.process_time() - began, len(outcome.trials)
    print(f"a search of {trials} trials: {1e3 * spent / trials:.1f} ms a trial in all")


def main() -> None:
    torch.set_num_threads(1)
    decisions()
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
    kept, steps = time.perf_counter() - began - callback.searched, len(callback.ends)
    hooks = [np.array(times) for times in (callback.starts, callback.ends)]
    for name, times in (
        ("all calls", hooks),
        ("without other turns", [np.where(t > 1e-3, np.median(t), t) for t in hooks]),
    ):
        spent = sum(float(t.sum()) for t in times)
        share = 100 * spent / kept
        print(f"hooks, {name}: {1e6 * spent / steps:.1f} us of {1e3 * kept / steps:.2f} ms a kept step, {share:.2f} %")
    parts = (1e6 * float(np.median(times)) for times in (*hooks, callback.empty))
    print("medians: before a batch {:.1f} us, after it {:.1f} us; nothing at all {:.1f} us".format(*parts))
    losses = np.exp(-np.arange(100) / 30) + 0.05 * np.random.default_rng(0).standard_normal(100)
    began = time.process_time()
    for _ in range(50):
        forecast(losses, 1000)
    print(f"forecast of 100 losses: {(time.process_time() - began) / 50 * 1e3:.2f} ms")
    search = LRSearch(1e-5, 1.0)
    for i in range(9):
        search.tell(search.ask(), 1.0 + 0.1 * i, 0.05)
    began = time.process_time()
    for _ in range(20):
        search.ask()
    print(f"ask after 9 trials: {(time.process_time() - began) / 20 * 1e3:.2f} ms")


if __name__ == "__main__":
    main()
