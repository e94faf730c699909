"""What an all-reduce does when the time does not suffice, checked from outside."""

import random
import signal
import subprocess
import sys
from fractions import Fraction

import pytest
from paths import ROOT
from tree_checker import check_trees, proved
from tree_families import drawn, irregular

from trainkit.collectives import Topology, allreduce_forest, fabrics
from trainkit.collectives.trees import _allreduce


@pytest.mark.parametrize("seed", range(12))
def test_fitted_trees_and_their_gap_are_true(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every network answers without packing, too: trees that hold, a bound that holds, a time that is their own."""
    rng = random.Random(seed)
    topology = drawn(rng, 9) if seed % 2 else irregular(12, seed)
    topology = Topology(topology.name, topology.nodes, topology.compute_nodes, topology.links)
    best = allreduce_forest(topology)
    assert best.exact and best.certificate is not None
    assert proved(topology, best.certificate.lengths) == best.bound
    monkeypatch.setattr(_allreduce, "effort", lambda *_: type("Hopeless", (), {"seconds": float("inf")}))
    fitted = allreduce_forest(topology)
    check_trees(fitted)
    assert fitted.bound == best.bound <= fitted.time_per_byte
    fitted.schedule().verify()


@pytest.mark.parametrize("change", [{("g0_0", "IB"): 25}, {("nv1", "g1_3"): 225, ("IB", "g0_2"): 40}])
def test_slowed_links_cost_little_more_than_proved(
    change: dict[tuple[str, str], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_allreduce, "effort", lambda *_: type("Hopeless", (), {"seconds": float("inf")}))
    both = allreduce_forest(fabrics.dgx_h100(8).with_links(change))
    check_trees(both)
    assert both.bound <= both.time_per_byte < both.bound * Fraction(103, 100)
    assert both.height < 20


def test_a_linear_program_is_interrupted() -> None:
    """200 nodes take minutes: here they get two seconds, and what has been found so far."""
    both = allreduce_forest(irregular(200, seed=3), time_limit_s=2)
    assert not both.exact and 0 < both.bound < both.time_per_byte
    check_trees(both)


def test_ctrl_c_ends_the_linear_program() -> None:
    code = (
        f"import sys\nsys.path.append({str(ROOT / 'tests' / 'support')!r})\n"
        "from trainkit.collectives import allreduce_forest\nfrom tree_families import irregular\n"
        "def told(phase, done, total):\n    if phase == 'linear program': print('running', flush=True)\n"
        "allreduce_forest(irregular(200, seed=3), progress=told)"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert worker.stdout is not None
    assert worker.stdout.readline() == "running\n"
    worker.send_signal(signal.SIGINT)
    _, said = worker.communicate(timeout=60)
    assert "KeyboardInterrupt" in said


@pytest.mark.parametrize("limit", [0, -1, float("nan"), float("inf"), "5", None])
def test_a_time_limit_is_a_time(limit: object) -> None:
    with pytest.raises(ValueError, match="time_limit_s"):
        allreduce_forest(fabrics.ring(4), time_limit_s=limit)  # type: ignore[arg-type]
