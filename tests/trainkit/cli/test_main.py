"""The command line: every verb's help is light and shows an example; refused input is one line and exit code 2."""

import subprocess
import sys
from pathlib import Path

import pytest

from trainkit.cli._main import _VERBS, main


@pytest.mark.parametrize("verb", sorted(_VERBS))
def test_help_is_light_and_has_an_example(verb: str, tmp_path: Path) -> None:
    code = (
        "import sys; from trainkit.cli import main\n"
        f"sys.argv = ['trainkit', *{verb.split()!r}, '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'pytorch_lightning', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert f"trainkit {verb}" in done.stdout
    assert "Example:" in done.stdout


def test_overview_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {verb} " in said for verb in _VERBS)


def test_unknown_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dance"]) == 2
    assert "no verb 'dance'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["demo", "--size", "huge"], "size must be one of tiny, small, 30m, 124m, got 'huge'"),
        (["demo", "--workers", "0"], "workers must be at least 1, got 0"),
        (["demo", "--vocab", "100"], "vocab must be at least 256, got 100"),
        (["demo", "--resume"], "--resume needs a run's folder"),
    ],
)
def test_bad_input_is_one_line(words: list[str], what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*words, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert what in said
    assert said.count("\n") == 1
    assert not (tmp_path / "run").exists()
