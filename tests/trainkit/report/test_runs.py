"""Runs: what Lightning's loop did is what the record says, and what the record says is what the report says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader

from trainkit import AutoLRS, RunReport
from trainkit.cli._main import main
from trainkit.report import Run, report, summary


class Line(pl.LightningModule):
    """Fits a line; remembers each loss and rate by itself."""

    def __init__(self, accumulate: int = 1) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1)
        self.losses: list[float] = []

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        loss = (self.layer(batch) - batch.sum(1, keepdim=True)).square().mean()
        self.losses.append(loss.item())
        return loss

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        self.log("val_loss", (self.layer(batch) - batch.sum(1, keepdim=True)).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def loader(count: int = 64) -> DataLoader[Any]:
    torch.manual_seed(0)
    return DataLoader(torch.randn(count, 3), batch_size=8)  # type: ignore[arg-type]


def fit(folder: Path, *callbacks: Any, model: pl.LightningModule | None = None, **options: Any) -> pl.Trainer:
    settings: dict[str, Any] = {
        "max_epochs": 2,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    settings |= {"logger": False, "enable_checkpointing": False, "default_root_dir": folder, **options}
    trainer = pl.Trainer(callbacks=list(callbacks), **settings)
    trainer.fit(model or Line(), loader(), loader(16))
    return trainer


def test_a_run_is_recorded_as_it_went(tmp_path: Path) -> None:
    model = Line()
    fit(tmp_path, RunReport(tmp_path / "run", name="first"), model=model)
    run = Run.load(tmp_path / "run")
    assert run.columns["step"] == list(range(1, 17))
    assert run.columns["loss"] == pytest.approx(model.losses, rel=1e-7)
    assert set(run.columns["rate"]) == {0.05}
    assert [step for step, _ in zip(*run.column("val_loss"), strict=True)] == [8, 16]
    for name in ("forward_s", "backward_s", "network_s", "optimizer_s"):
        assert all(value >= 0 for value in run.columns[name])
    sums = [
        sum(run.columns[n][at] for n in ("forward_s", "backward_s", "network_s", "optimizer_s")) for at in range(16)
    ]
    assert all(part <= whole for part, whole in zip(sums, run.columns["step_s"], strict=True))
    assert run.environment["torch"] == torch.__version__.split("+")[0] or run.environment["torch"] == torch.__version__
    assert run.settings["parameters"] == 4
    page = (tmp_path / "run" / "report.html").read_text()
    assert "first" in page and "http" not in page.replace("http-equiv", "")


def test_accumulated_batches_are_one_step(tmp_path: Path) -> None:
    fit(tmp_path, RunReport(tmp_path / "run"), accumulate_grad_batches=4)
    assert Run.load(tmp_path / "run").columns["step"] == [1, 2, 3, 4]


def test_losses_come_in_their_unit(tmp_path: Path) -> None:
    model = Line()
    fit(tmp_path, RunReport(tmp_path / "run", scale=1 / math.log(2), loss_unit="bits"), model=model)
    run = Run.load(tmp_path / "run")
    assert run.columns["loss"] == pytest.approx([loss / math.log(2) for loss in model.losses], rel=1e-7)
    assert run.loss_unit == "bits"


def test_autolrs_brings_a_report_into_the_loggers_folder(tmp_path: Path) -> None:
    trainer = fit(tmp_path, AutoLRS(), logger=CSVLogger(tmp_path), max_epochs=20, max_steps=150)
    folder = Path(str(trainer.log_dir)) / "trainkit"
    run = Run.load(folder)
    assert run.search and run.search["trials"] and (folder / "report.html").exists()
    # steps of a kept trial were made in the search: they have a rate and no times of their own
    assert len(run.columns["step"]) == 150
    assert all(value >= 0 for name in ("forward_s", "backward_s", "step_s") for value in run.column(name)[1])
    told = summary(run)
    assert told["search"]["trials"] == len(run.search["trials"])


@pytest.mark.parametrize("options", [{"report": False, "logger": True}, {"report": True, "logger": False}])
def test_without_a_place_or_a_wish_nothing_is_written(tmp_path: Path, options: dict[str, Any]) -> None:
    logger = CSVLogger(tmp_path / "logs") if options["logger"] else False
    fit(tmp_path, AutoLRS(report=options["report"]), logger=logger, max_steps=30)
    assert not list(tmp_path.rglob("run.json"))


def test_a_run_that_fails_is_reported_up_to_there(tmp_path: Path) -> None:
    class Failing(Line):
        def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
            if self.global_step == 5:
                raise RuntimeError("no more")
            return super().training_step(batch, index)

    with pytest.raises(RuntimeError, match="no more"):
        fit(tmp_path, RunReport(tmp_path / "run"), model=Failing())
    assert Run.load(tmp_path / "run").columns["step"] == [1, 2, 3, 4, 5]


def test_a_resumed_run_is_one_record(tmp_path: Path) -> None:
    first = fit(tmp_path, RunReport(tmp_path / "run"), max_epochs=1)
    first.save_checkpoint(tmp_path / "half.ckpt")
    again = pl.Trainer(
        callbacks=[RunReport(tmp_path / "run")], max_epochs=2, logger=False, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, accelerator="cpu",
    )  # fmt: skip
    again.fit(Line(), loader(), loader(16), ckpt_path=tmp_path / "half.ckpt")
    assert Run.load(tmp_path / "run").columns["step"] == list(range(1, 17))


def test_several_runs_side_by_side(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two"):
        fit(tmp_path, RunReport(tmp_path / "runs" / name, name=name))
    assert main(["report", str(tmp_path / "runs"), "--out", str(tmp_path / "both.html")]) == 0
    page = (tmp_path / "both.html").read_text()
    assert "one, held out" in page and "two, held out" in page
    capsys.readouterr()
    assert main(["report", str(tmp_path / "runs" / "one"), str(tmp_path / "runs" / "two"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [run["name"] for run in told] == ["one", "two"] and told[0]["steps"] == 16


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "run.json").unlink(), "does not"),
        (lambda folder: (folder / "run.json").write_text("{"), "must hold"),
        (lambda folder: (folder / "run.json").write_text('{"version": 9}'), "version 1"),
        (lambda folder: (folder / "run.json").write_text('{"version": 1, "odd": 2}'), "must hold"),
        (lambda folder: (folder / "metrics.csv").unlink(), "must hold"),
        (lambda folder: (folder / "metrics.csv").write_text("step,loss\n1,two\n"), "must hold"),
        (lambda folder: (folder / "metrics.csv").write_text(""), "must hold"),
    ],
)
def test_what_is_no_run_is_refused(tmp_path: Path, spoil: Any, words: str) -> None:
    folder = tmp_path / "run"
    Run(name="x", columns={"step": [1.0], "loss": [2.0]}).save(folder)
    assert Run.load(folder).columns == {"step": [1.0], "loss": [2.0]}
    spoil(folder)
    with pytest.raises(ValueError, match=words):
        Run.load(folder)


def test_a_report_of_no_run_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one run"):
        report([])


def test_a_large_report_is_small() -> None:
    names = (
        "loss",
        "rate",
        "step_s",
        "forward_s",
        "backward_s",
        "network_s",
        "optimizer_s",
        "sent_bytes",
        "received_bytes",
    )
    columns = {name: [abs(math.sin(at + len(name))) + 1 for at in range(20_000)] for name in names}
    runs = [Run(name=f"run {n}", columns={"step": list(range(20_000)), **columns}) for n in range(5)]
    assert len(report(runs)) < 1_500_000
