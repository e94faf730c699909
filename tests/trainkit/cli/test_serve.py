"""`trainkit serve ...` from the command line."""

import json
from pathlib import Path

import pytest

from trainkit.cli import main
from trainkit.serving import Profile

LINE = "resnet=1.053*b+5.072"


def answer(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    assert main(["serve", "simulate", *words, "--json"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


def test_gpus_for_a_rate(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(capsys, "--profile", LINE, "--slo", "25ms", "--rate", "5000", "--seconds", "5")
    assert found["gpus_needed"] == found["gpus"] == 8
    assert found["bad"] <= 0.01  # type: ignore[operator]


def test_rate_for_gpus(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    Profile.linear(1.053, 5.072, 32).save(tmp_path / "resnet.json")
    words = ["--profile", str(tmp_path / "resnet.json"), "--slo", "25ms", "--gpus", "8", "--seconds", "5"]
    found = answer(capsys, *words)
    assert found["models"] == ["resnet"]
    assert 5250 < found["goodput"] < 5875  # type: ignore[operator]
    assert main(["serve", "simulate", *words, "--plot", str(tmp_path / "p.png")]) == 0
    assert "requests/s are served with at most 1.0%" in capsys.readouterr().out
    assert (tmp_path / "p.png").stat().st_size > 1000


def test_a_recorded_trace(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"resnet": [0.0, 0.5, 0.5]}))
    found = answer(capsys, "--profile", LINE, "--slo", "25ms", "--arrivals", str(tmp_path / "t.json"))
    assert (found["arrived"], found["done"], found["gpus"]) == (3, 3, 1)


def test_gpus_that_come_and_go(capsys: pytest.CaptureFixture[str]) -> None:
    found = answer(
        capsys,
        "--profile",
        LINE,
        "--slo",
        "25ms",
        "--rate",
        "1500",
        "--scale",
        "1:8",
        "--start",
        "1s",
        "--seconds",
        "20",
    )
    assert 3 <= found["gpus"][-1] <= 5  # type: ignore[index]
    assert found["gpu_seconds"] < 20 * 5  # type: ignore[operator]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--profile", LINE, "--slo", "25ms"], "one of --rate, --gpus is needed"),
        (["--profile", "no.json", "--slo", "25ms", "--gpus", "1"], "No such file"),
        (["--profile", f"{LINE},{LINE}", "--slo", "25ms", "--gpus", "1"], "names a model once"),
        (["--profile", LINE, "--slo", "25", "--gpus", "1"], "a latency is a number and one of"),
        (["--profile", LINE, "--slo", "1ms,2ms", "--gpus", "1"], "one for each of the 1 models, got 2"),
        (["--profile", LINE, "--slo", "3ms", "--rate", "5", "--seconds", "1"], "is --slo above one batch's latency"),
        (["--profile", LINE, "--slo", "25ms", "--gpus", "1", "--policy", "x"], "policy is one of"),
        (["--profile", LINE, "--slo", "25ms", "--rate", "5", "--scale", "8"], "--scale is LEAST:MOST"),
        (["--profile", LINE, "--slo", "25ms", "--scale", "1:8"], "--scale needs --rate"),
    ],
)
def test_refusals_are_one_line(words: list[str], match: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "simulate", *words]) == 2
    said = capsys.readouterr().err
    assert match in said
    assert said.count("\n") == 1
