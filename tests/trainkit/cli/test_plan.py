"""`trainkit plan`."""

import json
from pathlib import Path

import pytest

from trainkit.cli import main
from trainkit.collectives import Schedule, fabrics
from trainkit.collectives.schedule.export import run_msccl, run_mscclpp


@pytest.fixture
def network(tmp_path: Path) -> str:
    path = tmp_path / "net.json"
    fabrics.boxes(2, 4, inside=200, uplink=25, unit="Mbit/s").save(path)
    return str(path)


def test_plan_says_what_limits_and_what_it_gains(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--topology", network]) == 0
    said = capsys.readouterr().out
    for words in ("1/x* = 1/25", "bottleneck", "100 Mbit/s", "proved optimal", "ring, rank order    7 times"):
        assert words in said


def test_plan_for_machines(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--topology", network, "--collective", "allgather", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["inv_rate"] == "1/25" and facts["time_per_unit"] == "1/200" and facts["exact"] is True
    assert main(["plan", "--topology", network, "--search", "--json"]) == 0
    assert "packing" in json.loads(capsys.readouterr().out)


def test_exports(network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["plan", "--topology", network, "--export", "json", "--chunks", "2", "--out", str(out)]) == 0
    Schedule.load(out).verify()
    assert main(["plan", "--topology", network, "--export", "msccl", "--out", str(out)]) == 0
    run_msccl(out.read_text())
    assert "0.00% slower than the optimum" in capsys.readouterr().err
    assert main(["plan", "--topology", network, "--export", "mscclpp", "--trees-per-root", "1"]) == 0
    run_mscclpp(capsys.readouterr().out)


def test_picture(network: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--topology", network, "--draw", str(tmp_path / "trees.svg")]) == 0
    assert "<svg" in (tmp_path / "trees.svg").read_text()
    assert f"written             {tmp_path / 'trees.svg'}" in capsys.readouterr().out


def test_runtimes_differ(network: str, capsys: pytest.CaptureFixture[str]) -> None:
    for runtime, word in (("msccl", "reduce_scatter"), ("azure", "reducescatter"), ("rccl", "reducescatter")):
        words = ["--collective", "reduce_scatter", "--export", "msccl", "--runtime", runtime]
        assert main(["plan", "--topology", network, *words]) == 0
        text = capsys.readouterr().out
        run_msccl(text)
        assert f'coll="{word}"' in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--collective", "gossip"], "--collective must be one of"),
        (["--export", "pdf"], "--export must be"),
        (["--draw", "trees.txt"], "--draw must end with .svg, .png, .pdf, got 'trees.txt'"),
        (["--runtime", "nccl"], "--runtime must be msccl, azure or rccl, got 'nccl'"),
        (["--machines", "0"], "--machines must be at least 1, got 0"),
        (["--nbytes", "0"], "--nbytes must be at least 1"),
        (["--collective", "broadcast"], "root None: name one of g0_0"),
        (["--max-height", "0"], "max_height must be a whole number >= 1, got 0"),
        (["--collective", "broadcast", "--root", "g0_0", "--export", "msccl"], "not broadcast"),
    ],
)
def test_refusals_are_one_line(network: str, words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--topology", network, *words]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1
