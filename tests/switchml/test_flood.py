"""Forged, replayed, truncated and bit-flipped packets from a third namespace change no bit of a training."""

import json
import os
import subprocess
import sys

import pytest
from paths import BENCHMARKS

_FLOOD = BENCHMARKS / "switchml" / "flood.py"


@pytest.mark.netns
@pytest.mark.timeout(900)
@pytest.mark.parametrize("packets", [20_000, pytest.param(1_000_000, marks=pytest.mark.slow)])
def test_flood_changes_no_bit_of_a_training(packets: int) -> None:
    # a script with modules beside it
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    command = [sys.executable, str(_FLOOD), str(packets)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    answer = json.loads(done.stdout.splitlines()[-1])
    assert sum(answer["attack"]["sent"].values()) == packets
    assert answer["same_bits_as_in_peace"]
    assert answer["same_bits_on_all_ranks"]
    # it met the session: wrong tags and old packets were seen at both ends
    assert answer["switch_counters"]["forged"] > packets / 10
    assert answer["switch_counters"]["stale"] > packets / 100
    assert answer["worker_counters_during"]["malformed"] > packets / 100
