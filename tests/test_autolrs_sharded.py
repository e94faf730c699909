"""FSDP2 on two CPU processes: each rank snapshots its own shards, and restores them bit for bit."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

SCRIPT = Path(__file__).parent / "data" / "autolrs_fsdp2.py"


def test_two_ranks_restore_their_own_shards_and_tune(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), str(port), tmp_path], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=240)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], errors
    first, second = (torch.load(tmp_path / f"end{rank}.pt") for rank in range(2))
    for end in (first, second):
        undisturbed, wild = end["ends"]
        assert all(torch.equal(a, b) for a, b in zip(undisturbed, wild, strict=True))
        # parameters and two moments; the last layer has a single row, so the halves are uneven
        assert end["held"] < 0.75 * end["whole"]
        assert all(torch.isfinite(s).all() for s in end["shards"])
    assert first["rates"] == second["rates"] and max(first["rates"]) > 1e-5
    assert first["losses"][-1] < 0.5 * first["losses"][0]
