"""AutoLRS with other loaders, and with the other Lightning package."""

import importlib.util
import subprocess
import sys
import warnings

import pytest
import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, IterableDataset

from trainkit import AutoLRS

torch.set_num_threads(1)

QUIET = {
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "logger": False,
}


class Numbers(IterableDataset):
    """Batch i is full of i; nobody knows how many there are."""

    def __init__(self, count):
        self.count = count

    def __iter__(self):
        return (torch.full((4, 3), float(i)) for i in range(self.count))


class Model(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net, self.seen = torch.nn.Linear(3, 1), {}

    def training_step(self, batch, batch_idx):
        if self.training:
            self.seen.setdefault(self.trainer.global_step, set()).add(float(batch[0, 0]))
        return self.net(batch / 100).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-9)


@pytest.mark.parametrize("length", [1000, 17], ids=["one epoch", "many epochs"])
def test_a_loader_without_a_length_loses_no_batch(length):
    model, auto = Model(), AutoLRS()
    loader = DataLoader(Numbers(length), batch_size=None, num_workers=0)
    pl.Trainer(max_steps=60, callbacks=[auto], enable_checkpointing=False, **QUIET).fit(model, loader)
    assert auto.history.trials
    first = auto.history.trials[0]
    order = [model.seen[step] for step in sorted(model.seen)]
    # a search's trials count up from its start, so a step may be seen again, with the same batch
    assert order == [{float(i % length)} for i in range(60)], first


def test_workers_that_prefetch_lose_no_batch():
    model, auto = Model(), AutoLRS()
    data = [torch.full((4, 3), float(i)) for i in range(25)]
    loader = DataLoader(data, batch_size=None, num_workers=1, prefetch_factor=3)
    pl.Trainer(max_steps=60, callbacks=[auto], enable_checkpointing=False, **QUIET).fit(model, loader)
    assert [model.seen[step] for step in sorted(model.seen)] == [{float(i % 25)} for i in range(60)]


@pytest.mark.parametrize("stop, told", [(40, True), (50, False)], ids=["mid-epoch", "epoch's end"])
def test_resuming_without_a_loaders_state_is_said(tmp_path, stop, told):
    data = [torch.full((4, 3), float(i)) for i in range(25)]
    loader = DataLoader(data, batch_size=None)

    def fit(resume=None):
        keep = pl.callbacks.ModelCheckpoint(
            tmp_path, filename="{step}", every_n_train_steps=stop, save_top_k=-1, save_on_train_epoch_end=stop == 50
        )
        trainer = pl.Trainer(max_steps=60, callbacks=[AutoLRS(), keep], **QUIET)
        trainer.fit(Model(), loader, ckpt_path=resume)

    fit()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fit(str(tmp_path / f"step={stop}.ckpt"))
    assert any("in the midst of an epoch" in str(w.message) for w in seen) == told


def test_with_lightning_pytorch():
    if importlib.util.find_spec("lightning") is None:
        pytest.skip("`lightning` is not installed (pip install lightning): only pytorch_lightning is tested")
    code = (
        "from lightning.pytorch import Trainer\n"
        "from lightning.pytorch.demos.boring_classes import BoringModel\n"
        "from trainkit import AutoLRS\n"
        "auto = AutoLRS()\n"
        "trainer = Trainer(max_steps=50, accelerator='cpu', callbacks=[auto], logger=False,\n"
        "                  enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)\n"
        "trainer.fit(BoringModel())\n"
        "print(auto.history.kept_steps, auto.history.discarded_steps > 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.split()[-2:] == ["50", "True"], done.stderr[-2000:]
