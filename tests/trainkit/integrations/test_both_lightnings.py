"""`pytorch_lightning` and `lightning` hold the same code twice: each Trainer takes the strategies that are its own."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import pytest
import pytorch_lightning
from paths import ROOT

import trainkit
import trainkit.lightning
from trainkit.collectives import ForestOptions, Topology
from trainkit.switchml import SwitchMLState

PAIR = Topology("pair", list("ab"), list("ab"), [("a", "b", 1), ("b", "a", 1)])
MADE: dict[str, Callable[[Any], Any]] = {
    "ForestStrategy": lambda kind: kind(PAIR, timeout_s=3.0, find_unused_parameters=True),
    "SwitchMLStrategy": lambda kind: kind("127.0.0.1:1", wire="int16", find_unused_parameters=True),
    "AutoNetworkStrategy": lambda kind: kind(PAIR, window=7, find_unused_parameters=True),
}


@pytest.mark.parametrize("name", MADE)
def test_each_trainer_takes_its_own_and_is_told_about_the_other(name: str) -> None:
    ours, theirs = (MADE[name](getattr(home, name)) for home in (trainkit, trainkit.lightning))
    for package, strategy, other in ((pytorch_lightning, ours, theirs), (lightning, theirs, ours)):
        trainer = package.Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False)
        assert trainer.strategy is strategy
        # what DDP names went to DDP, the rest to the engine
        assert strategy._ddp_kwargs == {"find_unused_parameters": True}
        home = "trainkit" if package is pytorch_lightning else "trainkit.lightning"
        with pytest.raises(ValueError, match=f"from {home} import {name}"):
            package.Trainer(accelerator="cpu", devices=2, strategy=other, logger=False)
    assert inspect.getdoc(type(ours)) == inspect.getdoc(type(theirs))


@pytest.mark.parametrize("home", [trainkit, trainkit.lightning])
@pytest.mark.parametrize("name", MADE)
def test_no_option_is_lost_among_ddps_keywords(home: Any, name: str) -> None:
    kind, first = getattr(home, name), "127.0.0.1:1" if name.startswith("Switch") else PAIR
    with pytest.raises(TypeError, match="has no option 'chanels'"):
        kind(first, chanels=2)
    with pytest.raises(TypeError, match="brings its own hook: leave ddp_comm_hook= out"):
        kind(first, ddp_comm_hook=print)
    with pytest.warns(DeprecationWarning, match="deadline_s"):
        made = kind(first, deadline_s=2.5)
    assert made.hook_state.options.timeout_s == 2.5


def test_the_engines_own_options_and_states_are_taken() -> None:
    options = ForestOptions(timeout_s=9, interface="lo")
    assert trainkit.ForestStrategy(PAIR, options=options).forest_state.options == options
    state = SwitchMLState("127.0.0.1:1", channels=2)
    assert trainkit.SwitchMLStrategy(state).switchml_state is state
    assert trainkit.SwitchMLStrategy("127.0.0.1:1", channels=2).switchml_state.options.channels == 2
    with pytest.raises(TypeError, match="has its options already: leave channels out"):
        trainkit.SwitchMLStrategy(state, channels=2)


SPAWNED = """
import json, sys, pytorch_lightning as pl, torch
from lightning_ranks import Net
from trainkit import ForestStrategy
from trainkit.collectives import Topology

if __name__ == "__main__":
    torch.set_num_threads(1)
    pair = Topology("pair", list("ab"), list("ab"), [("a", "b", 1), ("b", "a", 1)])
    strategy = ForestStrategy(pair, timeout_s=20.0, start_method=sys.argv[1])
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=4, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    before = strategy.counters()
    trainer.fit(Net(False), torch.utils.data.DataLoader(torch.randn(64, 16), batch_size=4))
    print(json.dumps([before, strategy.counters()]))
"""


@pytest.mark.parametrize("start_method", [pytest.param("spawn", marks=pytest.mark.slow), "fork"])
def test_counters_come_back_from_other_processes(tmp_path: Path, start_method: str) -> None:
    script = tmp_path / "spawned.py"
    script.write_text(SPAWNED)
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "support")}
    ran = subprocess.run(
        [sys.executable, str(script), start_method], env=environment, capture_output=True, text=True, timeout=200
    )
    assert ran.returncode == 0, ran.stderr
    before, after = json.loads(ran.stdout.splitlines()[-1])
    assert not any(before.values()) and after["sent_bytes"] > 4 * 577 * 4 / 2
