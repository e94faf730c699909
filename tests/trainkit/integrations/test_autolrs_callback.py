"""AutoLRS on a Trainer: rates really applied, paired batches, books, resume bit for bit, two processes."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from execute_ranks import module_at, processes
from paths import DATA

SCRIPT = DATA / "autolrs_fit.py"


@pytest.fixture(scope="module")
def script():
    return module_at(SCRIPT)


def fit_rank(rank, out, arguments):
    module_at(SCRIPT).fit(out, **arguments)


def two_ranks(out, **arguments):
    """In two processes; how each of them ended."""
    processes(fit_rank, 2, out, {"world": 2, **arguments}, backend="", deadline_s=200)
    return [torch.load(path, weights_only=False) for path in sorted(out.glob("end*.pt"))]


def run(out, **arguments):
    """In processes that Lightning starts; the exit code and rank 0's end, if any."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, out, json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
    )
    ends = [torch.load(path, weights_only=False) for path in sorted(Path(out).glob("end*.pt"))]
    assert done.returncode == 0 or arguments.get("die"), done.stderr[-3000:]
    return done.returncode, ends


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def assert_same_end(a, b):
    for key in ("parameters", "buffers", "optimizer", "schedule", "step"):
        assert same(a[key], b[key]), key
    for key in ("stages", "trials", "kept_steps", "discarded_steps", "extra_forwards"):
        assert a["history"][key] == b["history"][key], key


@pytest.fixture(scope="module")
def plain(script, tmp_path_factory):
    out = tmp_path_factory.mktemp("plain")
    return out, script.fit(out, groups=True, every=1)


def test_books(plain):
    history = plain[1]["history"]
    assert history["kept_steps"] + history["discarded_steps"] == 120 == len(plain[1]["seen"])
    assert history["kept_steps"] == plain[1]["step"] == len(plain[1]["rates"])
    assert 0 <= history["discarded_steps"] <= 0.35 * 120 and history["trials"]
    assert history["discarded_steps"] == sum(t["steps"] for t in history["trials"] if t["status"] != "committed")
    assert history["extra_forwards"] > 0
    json.dumps(history, allow_nan=False)


def test_every_step_of_every_trial_ran_at_factor_times_rate(plain):
    """The first step of each trial included; groups keep 1 : 0.1."""
    end, expected, step = plain[1], [], 0
    warmup, trials = end["schedule"]["warmup_steps"], end["history"]["trials"]
    for stage in sorted({t["stage"] for t in trials}):
        tried = [t for t in trials if t["stage"] == stage]
        expected += end["rates"][step : tried[0]["start"]]
        for trial in tried:
            warm = [min((trial["start"] + i + 1) / warmup, 1.0) for i in range(trial["steps"])]
            expected += [trial["rate"] * share for share in warm]
        step = tried[0]["start"] + sum(t["steps"] for t in tried if t["status"] == "committed")
    expected += end["rates"][step:]
    assert [rates[0] for rates in end["seen"]] == pytest.approx(expected, rel=1e-12)
    assert all(rates[1] == pytest.approx(0.1 * rates[0]) for rates in end["seen"])


def test_trials_see_the_same_batches_and_none_is_lost(plain):
    end = plain[1]
    first = [t for t in end["history"]["trials"] if t["stage"] == 0]
    seen, at = [batch for _, batch in end["batches"]], 0
    runs = []
    for trial in first:
        runs.append(seen[at : at + trial["steps"]])
        at += trial["steps"]
    longest = max(runs, key=len)
    assert all(r == longest[: len(r)] for r in runs)
    # every kept step has one batch, all different within and across epochs
    by_step = {}
    for step, batch in end["batches"]:
        by_step.setdefault(step, set()).add(batch)
    assert all(len(batches) == 1 for batches in by_step.values())
    assert len({b for s in by_step.values() for b in s}) == end["step"] == len(by_step)


def test_it_learns_and_ends_annealed(plain):
    end = plain[1]
    stages = end["history"]["stages"]
    assert stages[-1]["anneal"] and stages[-1]["start"] + stages[-1]["steps"] == end["step"]
    assert end["rates"][-1] < 0.1 * max(end["rates"])
    assert end["metric"] < 1.5  # the useless default 1e-9 stays at 1.6


def test_resume_from_any_step_is_bit_for_bit(script, plain, tmp_path):
    out, end = plain
    trials = end["history"]["trials"]
    kept = next(t["steps"] for t in trials if t["status"] == "committed")
    for step in {
        1,
        kept - 1,
        23,
        46,
        end["step"] - 1,
    }:  # within a committed trial's replay, at epochs' ends, near the end
        again = script.fit(tmp_path / str(step), resume=str(out / f"step={step}.ckpt"), groups=True)
        assert_same_end(end, again)


@pytest.mark.parametrize(
    "options",
    [{"kind": "sgd"}, {"kind": "fused"}, {"accumulate": 4, "steps": 60}, {"ema": True}, {"fp16": True}],
    ids=["sgd", "fused", "accumulation", "ema", "fp16 scaler"],
)
def test_resume_of(script, tmp_path, options):
    end = script.fit(tmp_path / "whole", every=1, **options)
    step = end["step"] * 2 // 3
    for at in (3, step):
        again = script.fit(tmp_path / f"again{at}", resume=str(tmp_path / "whole" / f"step={at}.ckpt"), **options)
        assert_same_end(end, again)


@pytest.mark.parametrize(
    "options", [{}, {"kind": "sgd"}, {"ema": True}, {"accumulate": 3}], ids=["adamw", "sgd", "ema", "accumulation"]
)
def test_the_run_equals_its_schedule_replayed_without_searches(script, tmp_path, options):
    """What was kept is what a run at the found rates would have done: no trace of the trials."""
    import pytorch_lightning as pl

    whole = script.fit(tmp_path / "whole", **options)
    options = dict(options)
    accumulate, ema = options.pop("accumulate", 1), options.pop("ema", False)
    pl.seed_everything(0)
    module, rates = script.Model(**options), whole["rates"]

    class Replay(pl.Callback):
        def on_train_batch_start(self, trainer, *args):
            for group in trainer.optimizers[0].param_groups:
                group["lr"] = rates[trainer.global_step]

    callbacks = [Replay(), script.EMAWeightAveraging(decay=0.9)] if ema else [Replay()]
    trainer = pl.Trainer(
        max_steps=whole["step"],
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        accelerator="cpu",
        devices=1,
        enable_checkpointing=False,
        accumulate_grad_batches=accumulate,
    )
    trainer.fit(module, script.Loader(0))
    assert same(whole["parameters"], dict(module.named_parameters()))
    assert same(whole["buffers"], dict(module.named_buffers()))


def test_two_processes_agree_and_survive_a_nan_on_one(tmp_path):
    first, second = two_ranks(tmp_path, nan_rank=1, nan_above=0.002)
    assert same(first["parameters"], second["parameters"])
    assert first["rates"] == second["rates"] and first["seen"] == second["seen"]
    assert any(t["status"] == "diverged" for t in first["history"]["trials"])
    assert all(torch.isfinite(p).all() for p in first["parameters"].values())
    assert max(first["rates"]) <= 0.002
    assert first["calls"] == 120  # every optimizer step, those of trials included, went through the hook


@pytest.mark.slow
def test_two_processes_killed_and_resumed(tmp_path):
    _, ends = run(tmp_path / "whole", world=2, every=10)
    code, _ = run(tmp_path / "killed", world=2, every=10, die=43)
    assert code != 0
    _, again = run(tmp_path / "again", world=2, every=10, resume=str(tmp_path / "killed" / "step=40.ckpt"))
    for a, b in zip(ends, again, strict=True):
        assert_same_end(a, b)


def test_all_trials_diverging(script, tmp_path):
    end = script.fit(tmp_path, nan_rank=0, nan_above=1e-7)
    assert all(t["status"] == "diverged" for t in end["history"]["trials"])
    assert all(torch.isfinite(p).all() for p in end["parameters"].values())
    assert max(end["rates"]) <= 1e-9  # the user's own rate goes on
    assert end["step"] + end["history"]["discarded_steps"] == 120


def test_count_kept(script, tmp_path):
    end = script.fit(tmp_path, auto={"count": "kept"}, steps=100)
    assert end["step"] == 100 and 0 <= end["history"]["discarded_steps"] <= 0.35 / 0.65 * 100


def test_too_short_to_search_says_so_once(script, tmp_path):
    with pytest.warns(UserWarning, match="too few to search"):
        end = script.fit(tmp_path, steps=12)
    assert end["history"]["trials"] == [] and end["step"] == 12


@pytest.mark.parametrize(
    "arguments, match",
    [
        ({"low": 1.0, "high": 1e-3}, "0 < low < high.*low=1.0"),
        ({"stage_steps": 10, "trial_steps": 20}, "trial_steps=20.*stage_steps=10"),
        ({"budget": 1.5}, "0 < budget < 1.*1.5"),
        ({"count": "some"}, "'kept', 'all'.*'some'"),
        ({"backend": "botorch"}, "backend.*'botorch'"),
        ({"warmup_steps": -1}, "warmup_steps.*-1"),
        ({"warmup_steps": 0.5}, "warmup_steps.*0.5"),
        ({"seed": -1}, "seed.*-1"),
        ({"low": "1e-3"}, "0 < low < high.*low='1e-3'"),
        ({"snapshot": "gpu"}, "'device', 'cpu' or 'disk'.*'gpu'"),
        ({"search_loss": "test"}, "search_loss.*'test'"),
        ({"candidates": 0}, "candidates.*0"),
    ],
)
def test_bad_arguments_fail_at_setup(script, arguments, match, tmp_path):
    from pytorch_lightning import Trainer

    from trainkit import AutoLRS

    trainer = Trainer(max_steps=10, accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match=match):
        AutoLRS(**arguments).setup(trainer, script.Model(), "fit")


def test_an_empty_validation_loader_and_an_endless_run(script):
    import pytorch_lightning as pl

    from trainkit import AutoLRS

    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }

    class Validated(script.Model):
        def validation_step(self, batch, batch_idx):
            return None

    class Nothing(list):
        pass

    trainer = pl.Trainer(max_steps=60, accelerator="cpu", callbacks=[AutoLRS()], **quiet)
    with pytest.raises(ValueError, match="validation loader, but it gave no batch"):
        trainer.fit(Validated(), script.Loader(0), iter_only())
    trainer = pl.Trainer(max_steps=-1, max_epochs=-1, accelerator="cpu", callbacks=[AutoLRS()], **quiet)
    with pytest.raises(ValueError, match=r"run's length.*set max_steps"):
        trainer.fit(script.Model(), script.Loader(0))


def iter_only():
    class Empty(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(())

    return torch.utils.data.DataLoader(Empty())


def test_search_loss_by_function_and_from_the_validation_loader(script):
    import pytorch_lightning as pl

    from trainkit import AutoLRS

    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    seen = []

    def measure(module, batch):
        seen.append(module.training)
        return torch.nn.functional.cross_entropy(module.net(batch[0]), batch[1])

    for loss in (measure, "train", "auto"):
        callback = AutoLRS(search_loss=loss, snapshot="cpu")

        class Validated(script.Model):
            def validation_step(self, batch, batch_idx):
                return None

        trainer = pl.Trainer(max_steps=70, accelerator="cpu", callbacks=[callback], num_sanity_val_steps=0, **quiet)
        trainer.fit(Validated(), script.Loader(0), script.Loader(1, 4))
        assert callback.history.trials and callback.history.kept_steps == 70
    assert seen and not any(seen)


def test_a_callback_of_an_ended_fit_searches_again(script):
    import pytorch_lightning as pl

    from trainkit import AutoLRS

    callback, searches = AutoLRS(search_loss="train"), []
    for _ in range(2):
        trainer = pl.Trainer(
            max_steps=70,
            accelerator="cpu",
            callbacks=[callback],
            enable_progress_bar=False,
            enable_model_summary=False,
            logger=False,
            enable_checkpointing=False,
        )
        torch.manual_seed(0)
        trainer.fit(script.Model(), script.Loader(0))
        searches.append([(t.rate, t.start, t.losses) for t in callback.history.trials])
    assert searches[0] and searches[0] == searches[1]


def test_paper_and_skopt_run(script, tmp_path):
    end = script.fit(
        tmp_path / "paper", auto={"preset": "paper", "stage_steps": 20, "trial_steps": 5, "candidates": 3}, steps=120
    )
    assert all(t["status"] != "committed" for t in end["history"]["trials"]) and end["history"]["extra_forwards"] == 0
    assert len({t["stage"] for t in end["history"]["trials"]}) >= 2
    end = script.fit(tmp_path / "skopt", auto={"backend": "skopt", "candidates": 3}, steps=80)
    assert end["history"]["trials"]


def test_lightning_cli_builds_it(monkeypatch):
    from pytorch_lightning.cli import LightningCLI
    from pytorch_lightning.demos.boring_classes import BoringModel

    arguments = [
        "--trainer.callbacks+=trainkit.AutoLRS",
        "--trainer.callbacks.low=1e-4",
        "--trainer.callbacks.count=all",
    ]
    monkeypatch.setattr("sys.argv", ["train.py", *arguments])
    cli = LightningCLI(BoringModel, run=False, save_config_callback=None)
    (auto,) = (callback for callback in cli.trainer.callbacks if type(callback).__name__ == "AutoLRS")
    assert (auto._options.low, auto._options.count) == (1e-4, "all")


def test_progress_bar_and_plot(script, tmp_path, capsys):
    import pytorch_lightning as pl

    from trainkit import AutoLRS

    callback = AutoLRS()
    trainer = pl.Trainer(
        max_steps=70,
        accelerator="cpu",
        callbacks=[callback, pl.callbacks.TQDMProgressBar()],
        enable_model_summary=False,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(script.Model(), script.Loader(0))
    shown = capsys.readouterr()
    assert "lr_search=stage 1 trial 1/" in shown.out + shown.err
    assert "get_metrics" not in vars(trainer.progress_bar_callback)
    callback.plot().savefig(tmp_path / "run.png")
    assert (tmp_path / "run.png").stat().st_size > 10_000
