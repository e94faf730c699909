"""The demo's parts, each alone: corpus, loader, model, checkpoints, processes, report."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import zipfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch
from execute_ranks import RANKS, start

from trainkit._processes import Workers
from trainkit.demo import SIZES, Config, WorkerFailed, prepare
from trainkit.demo._checkpoint import DurableCheckpointIO, newest_checkpoint
from trainkit.demo._corpus import WindowLoader, write_corpus
from trainkit.demo._model import GPT

TINY = {"size": "tiny", "workers": 2, "accelerator": "cpu", "steps": 40, "vocab": 256, "seed": 0, "deadline_s": 20.0}


def loader(rank: int = 0, world_size: int = 2, seed: int = 0) -> WindowLoader:
    data = torch.from_numpy(np.arange(5000, dtype=np.int64) % 251).to(torch.uint8)
    return WindowLoader(data, batch=3, context=16, length=5, seed=seed, rank=rank, world_size=world_size)


def test_ranks_share_a_batch_without_overlap() -> None:
    both = torch.cat([next(iter(loader(rank))) for rank in (0, 1)])
    assert both.shape == (6, 17)
    assert len({tuple(row.tolist()) for row in both}) == 6


def test_loader_resumes_inside_an_epoch() -> None:
    whole = loader()
    batches = [batch for _ in range(2) for batch in whole]
    assert len(batches) == 10
    first = loader()
    stream = iter(first)
    head = [next(stream) for _ in range(3)]
    second = loader()
    second.load_state_dict(first.state_dict())
    tail = [*second, *second]
    assert len(tail) == 7
    assert all(torch.equal(a, b) for a, b in zip(batches, head + tail, strict=True))


@pytest.mark.parametrize(("name", "vocab", "least", "most"), [
    ("tiny", 256, 0.1e6, 0.2e6), ("small", 256, 1.1e6, 1.5e6), ("30m", 256, 27e6, 33e6), ("124m", 50304, 118e6, 130e6),
])  # fmt: skip
def test_sizes(name: str, vocab: int, least: float, most: float) -> None:
    with torch.device("meta"):
        model = GPT(SIZES[name], vocab, rate=1e-6)
    assert least <= sum(p.numel() for p in model.parameters()) <= most


def test_model_is_causal_and_starts_uniform() -> None:
    torch.manual_seed(0)
    model = GPT(SIZES["tiny"], 300, rate=1e-6)
    tokens = torch.randint(0, 256, (2, 20))
    changed = tokens.clone()
    changed[:, 12:] = 7
    logits, other = model(tokens), model(changed)
    assert logits.shape == (2, 20, 300)
    assert torch.equal(logits[:, :12], other[:, :12])
    assert not torch.allclose(logits[:, 12:], other[:, 12:])
    assert abs(model._loss(tokens).item() - np.log(300)) < 0.3


def write_checkpoint(path: Path) -> None:
    torch.save({"weights": torch.arange(10000.0)}, path)


def test_the_newest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path) is None
    old, new = tmp_path / "step-00000010.ckpt", tmp_path / "step-00000020.ckpt"
    for path in (old, new):
        write_checkpoint(path)
    assert newest_checkpoint(tmp_path) == new
    whole = new.read_bytes()
    # a flipped bit in the data, a truncated file, an empty one
    position = whole.index(np.arange(10000.0, dtype=np.float32)[500:510].tobytes())
    for broken in (
        whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :],
        whole[: len(whole) // 2],
        b"",
    ):
        new.write_bytes(broken)
        assert newest_checkpoint(tmp_path) == old
    old.write_bytes(b"")
    with pytest.raises(ValueError, match=r"none in .* is \(step-00000010.ckpt, step-00000020.ckpt\): start anew"):
        newest_checkpoint(tmp_path)


def _write(folder: Path, ready: Connection) -> None:
    ready.send("ready")
    for step in range(1000):
        DurableCheckpointIO().save_checkpoint({"x": torch.zeros(1 << 18)}, str(folder / f"step-{step:08d}.ckpt"))


def test_a_checkpoint_under_its_name_is_whole(tmp_path: Path) -> None:
    """A writer killed at any time leaves only checkpoints that verify."""
    ready, theirs = RANKS.Pipe(duplex=False)
    writer = start(_write, tmp_path, theirs)
    ready.recv()
    time.sleep(random.Random(0).uniform(0.05, 0.3))
    writer.kill()
    writer.join()
    saved = list(tmp_path.glob("step-*.ckpt"))
    assert saved
    for path in saved:
        with zipfile.ZipFile(path) as archive:
            assert archive.testzip() is None


def test_prepare_refuses_a_folder_with_a_run(tmp_path: Path) -> None:
    config = Config(**TINY)  # type: ignore[arg-type]
    prepare(config, tmp_path / "run", overwrite=False)
    assert Config.load(tmp_path / "run") == config
    write_corpus(tmp_path / "run")
    for split in ("train", "validation"):
        assert (tmp_path / "run" / f"{split}.bin").stat().st_size > 1 << 16
    with pytest.raises(ValueError, match="--resume it, --overwrite it or name another"):
        prepare(config, tmp_path / "run", overwrite=False)
    (tmp_path / "run" / "old").touch()
    prepare(config, tmp_path / "run", overwrite=True)
    assert not (tmp_path / "run" / "old").exists()


def test_unreadable_config_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"size": "tiny"}))
    with pytest.raises(ValueError, match="is not a demo's config"):
        Config.load(tmp_path)


@pytest.fixture
def stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A worker module: rank 1 does what the job says, the others wait for a minute."""
    (tmp_path / "stub_worker.py").write_text(
        "import json, os, pathlib, sys, time\n"
        "from trainkit._processes import die_with_parent\n"
        "job = json.loads(sys.argv[1]); die_with_parent(job['parent'])\n"
        "pathlib.Path(job['logs'], f\"pid-{job['rank']}\").write_text(str(os.getpid()))\n"
        "if job['rank'] == 1: exec(job['code'])\n"
        "else: time.sleep(job['others'])\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "stub_worker"


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("os.kill(os.getpid(), 9)", r"worker 1 of 3 \(pid \d+\) was killed by SIGKILL"),
        ("sys.exit(3)", r"worker 1 of 3 \(pid \d+\) ended with exit code 3"),
        (
            "pathlib.Path(job['logs'], 'error-1.txt').write_text('OSError: gone'); sys.exit(1)",
            r"ended with exit code 1: OSError: gone",
        ),
    ],
)
def test_a_failed_worker_is_named_and_the_rest_end(stub: str, code: str, what: str, tmp_path: Path) -> None:
    job = {"code": code, "logs": str(tmp_path), "others": 60}
    started = time.monotonic()
    with pytest.raises(WorkerFailed, match=what), Workers(stub, job, count=3, logs=tmp_path, grace_s=0.5) as workers:
        workers.wait()
    assert time.monotonic() - started < 30
    for path in tmp_path.glob("pid-*"):
        assert not alive(int(path.read_text()))


def test_workers_die_with_their_parent(stub: str, tmp_path: Path) -> None:
    job = {"code": "time.sleep(60)", "logs": str(tmp_path), "others": 60}
    code = (
        "import json, sys, pathlib; from trainkit._processes import Workers\n"
        f"logs = pathlib.Path({str(tmp_path)!r})\n"
        f"with Workers({stub!r}, json.loads(sys.argv[1]), count=2, logs=logs, grace_s=1) as w: w.wait()"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, json.dumps(job)])
    deadline = time.monotonic() + 30
    pids: list[int] = []
    while len(pids) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
        pids = [int(text) for path in tmp_path.glob("pid-*") if (text := path.read_text())]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert len(pids) == 2
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))
