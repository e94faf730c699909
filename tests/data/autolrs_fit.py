"""A small fit under AutoLRS, run by tests/trainkit/integrations/test_autolrs_callback.py in processes of its own.

python autolrs_fit.py OUT '{"world": 2, "steps": 120, ...}' writes OUT/end<rank>.pt and checkpoints step=<n>.ckpt.
"""

import json
import logging
import os
import sys
import warnings
from pathlib import Path

import pytorch_lightning as pl
import torch
import torchmetrics
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import DDPStrategy

from trainkit import AutoLRS

warnings.filterwarnings("ignore")
logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
torch.set_num_threads(1)

TRUTH = torch.randn(20, 5, generator=torch.Generator().manual_seed(5))


class Recording:
    """Mixed into an optimizer: writes down every rate that a step ran at."""

    def step(self, closure=None):
        self.seen = [*getattr(self, "seen", []), [float(g["lr"]) for g in self.param_groups]]
        return super().step(closure)


class RecordingAdamW(Recording, torch.optim.AdamW):
    pass


class RecordingSGD(Recording, torch.optim.SGD):
    pass


class Log(list):
    """A record that trials must not take back, as they take back a module's own lists."""


class Model(pl.LightningModule):
    def __init__(self, kind="adamw", nan_rank=None, nan_above=0.03, groups=False):
        super().__init__()
        self.kind, self.nan_rank, self.nan_above, self.groups = kind, nan_rank, nan_above, groups
        self.net = torch.nn.Sequential(
            torch.nn.Linear(20, 32),
            torch.nn.BatchNorm1d(32),
            torch.nn.ReLU(),
            torch.nn.Dropout(0.1),
            torch.nn.Linear(32, 5),
        )
        self.accuracy = torchmetrics.MeanMetric()
        self.batches = Log()

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = torch.nn.functional.cross_entropy(self.net(x), y)
        self.accuracy(loss.detach())
        if self.training:
            self.batches.append((self.global_step, int(x.sum() * 1e4)))
        if (
            self.nan_rank == self.global_rank
            and self.training
            and self.optimizers().param_groups[0]["lr"] > self.nan_above
        ):
            loss = loss * float("nan")
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        layers = [{"params": [p for m in self.net[:2] for p in m.parameters()]}, {"params": self.net[4].parameters()}]
        layers = layers if self.groups else [{"params": self.net.parameters()}]
        if self.groups:
            layers[1]["lr"] = 1e-10
        if self.kind == "sgd":
            return RecordingSGD(layers, 1e-9, momentum=0.9)
        return RecordingAdamW(layers, 1e-9, fused=self.kind == "fused")


class Loader:
    """Deterministic batches with a state: epoch and position."""

    def __init__(self, rank, length=23):
        self.rank, self.length, self.at, self.state = rank, length, (0, 0), None

    def __len__(self):
        return self.length

    def __iter__(self):
        epoch, start = self.state if self.state is not None else (self.at[0] + (self.at[1] > 0), 0)
        self.state = None
        for place in range(start, self.length):
            self.at = (epoch, place + 1)
            draw = torch.Generator().manual_seed(epoch * 1009 + place * 17 + self.rank)
            x = torch.randn(16, 20, generator=draw)
            yield x, (x @ TRUTH + 0.5 * torch.randn(16, 5, generator=draw)).argmax(1)

    def state_dict(self):
        return {"epoch": self.at[0], "place": self.at[1]}

    def load_state_dict(self, state):
        self.state = (state["epoch"], state["place"]) if state["place"] < self.length else (state["epoch"] + 1, 0)


CALLS = [0]


def counting_hook(state, bucket):
    CALLS[0] += 1
    reduced = torch.distributed.all_reduce(bucket.buffer().div_(2), async_op=True).get_future()
    return reduced.then(lambda future: future.value()[0])


class HookedDDP(DDPStrategy):
    """DDP that calls its communication hook on CPU too."""

    def configure_ddp(self):
        super().configure_ddp()
        self.model.register_comm_hook(None, counting_hook)


class Stop(pl.Callback):
    def __init__(self, at):
        self.at = at

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.at:
            os._exit(9)


def fit(
    out, world=1, steps=120, resume=None, die=None, accumulate=1, ema=False, fp16=False, every=1000, auto=None, **model
):
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    pl.seed_everything(0)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    callback, module = AutoLRS(**{"count": "all", **(auto or {})}), Model(**model)
    callbacks = [callback, EMAWeightAveraging(decay=0.9)] if ema else [callback]
    callbacks += [Stop(die)] if die else []
    callbacks.append(
        ModelCheckpoint(out, filename="{step}", every_n_train_steps=every, save_top_k=-1, save_on_train_epoch_end=False)
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=20) if fp16 else None
    trainer = pl.Trainer(
        max_steps=steps,
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        accelerator="cpu",
        devices=world,
        strategy=HookedDDP() if world > 1 else "auto",
        plugins=[MixedPrecision("16-mixed", "cpu", scaler)] if fp16 else [],
        use_distributed_sampler=False,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, Loader(rank), ckpt_path=resume)
    end = {
        "parameters": dict(module.named_parameters()),
        "buffers": dict(module.named_buffers()),
        "optimizer": trainer.optimizers[0].state_dict(),
        "schedule": callback.schedule.as_dict(),
        "rates": callback.schedule.rates,
        "history": callback.history.as_dict(),
        "seen": trainer.optimizers[0].seen,
        "batches": module.batches,
        "step": trainer.global_step,
        "calls": CALLS[0],
        "metric": float(module.accuracy.compute()),
    }
    torch.save(end, out / f"end{rank}.pt")
    return end


if __name__ == "__main__":
    fit(sys.argv[1], **json.loads(sys.argv[2]))
