"""Whole programs as people write them, on two ranks: each framework's own loop ends, and the trees carried its gradients."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from trainkit.collectives import Topology

RUNS = {
    "torchrun + DDP": ["forest_ddp.py", "--topology", "PAIR", "--steps", "25"],
    "FSDP2": ["fsdp2_backend.py", "--topology", "PAIR", "--steps", "25"],
    "Accelerate": ["accelerate_forest.py", "--topology", "PAIR"],
    "transformers.Trainer, a callback": ["transformers_forest.py", "--topology", "PAIR"],
    "transformers.Trainer, the backend": ["transformers_forest.py", "--backend", "--topology", "PAIR"],
}
LIGHTNING = ["forest_lightning.py", "forest_lightning_unified.py"]


@pytest.fixture
def pair(tmp_path: Path) -> str:
    """A network of two."""
    Topology("pair", list("ab"), list("ab"), [("a", "b", 1), ("b", "a", 1)]).save(tmp_path / "pair.json")
    return str(tmp_path / "pair.json")


def _run(words: list[str]) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_loops_of_torchrun(name: str, pair: str) -> None:
    script, *words = RUNS[name]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = _run([*command, f"examples/{script}", *(pair if word == "PAIR" else word for word in words)])
    assert "step 20: loss" in said or "train_loss" in said


@pytest.mark.slow
@pytest.mark.parametrize("script", LIGHTNING)
def test_loops_of_lightning(script: str, pair: str) -> None:
    assert "sent_bytes" in _run([sys.executable, f"examples/{script}", pair, "2"])
