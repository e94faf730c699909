"""The command line: every help is light and its example runs; what is refused is one line and exit code 2."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

from trainkit.cli._main import _SUBCOMMANDS, _find, load, main

NETWORK = ROOT / "examples" / "forest_two_islands.json"
BLOCKED = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {packages!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
"""


def trainkit(*words: str, cwd: Path, without: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
    """`trainkit WORDS` in an interpreter of its own, in which the packages `without` are not installed."""
    code = BLOCKED.format(packages=without) + "from trainkit.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *words], cwd=cwd, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize("name", sorted(_SUBCOMMANDS))
def test_help_is_light_and_has_an_example(name: str, tmp_path: Path) -> None:
    code = (
        "import sys; from trainkit.cli import main\n"
        f"sys.argv = ['trainkit', *{name.split()!r}, '--help']\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'pytorch_lightning', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert f"trainkit {name}" in done.stdout
    assert f"Example:\n  {load(name).example}\n" in done.stdout


def example(name: str) -> list[str]:
    """The words after `trainkit` of a subcommand's example, which may stand behind a launcher."""
    words = shlex.split(load(name).example)
    return words[words.index("trainkit") + 1 :]


@pytest.mark.parametrize("name", sorted(_SUBCOMMANDS))
def test_the_example_parses(name: str) -> None:
    found = _find(example(name))
    assert found is not None and found[0] == name
    load(name).parser().parse_args(found[1])


@pytest.mark.parametrize(
    ("name", "says", "writes"),
    [
        ("check", "passed", []),
        ("docs", "# The automatic network", []),
        ("doctor", '"part": "training"', []),
        ("order", "rank_order.json", ["rank_order.json"]),
        ("plan", "forest.xml", ["forest.xml"]),
        ("topology show", "torus(4, 8)", ["torus.svg", "torus.csv", "torus.json"]),
    ],
)
def test_the_example_runs(name: str, says: str, writes: list[str], tmp_path: Path) -> None:
    (tmp_path / "network.json").write_text(NETWORK.read_text())
    (tmp_path / "examples").symlink_to(NETWORK.parent)
    done = trainkit(*example(name), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert all((tmp_path / file).stat().st_size for file in writes)


def test_overview_lists_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name} " in said for name in _SUBCOMMANDS)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["dance"], "there is no subcommand 'dance'\n"),
        (["dcotor"], "there is no subcommand 'dcotor'; did you mean doctor?\n"),
        (["topology", "fnid"], "there is no subcommand 'topology fnid'; did you mean topology find?\n"),
        (["topolgy"], "there is no subcommand 'topolgy'; did you mean topology?\n"),
        (["docs", "networ"], "there is no page networ; did you mean network?"),
        (["doctor", "trainin"], "got 'trainin'; did you mean training?"),
        (["check", "forst"], "got 'forst'; did you mean forest?"),
    ],
)
def test_a_word_that_is_near_is_named(words: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert what in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["demo", "--sizee", "tiny"], "there is no option --sizee; did you mean --size?"),
        (["demo", "--steps", "ten"], "--steps must be a whole number, got 'ten'"),
        (["switch", "--interval", "soon"], "--interval must be a number, got 'soon'"),
        (["p4", "deploy", "x.yaml", "--target", "bmv"], "--target must be one of bmv2, tofino, got 'bmv'"),
        (["p4", "deploy"], "missing PATH"),
        (["plan"], "missing --topology"),
        (["plan", "--topology", "x.json", "--buckets", "[a]"], "--buckets must be a list such as [1,2]"),
        (["doctor", "--out", "x"], "there is no option --out"),
    ],
)
def test_a_wrong_option_is_one_line(words: list[str], what: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(words)
    said = capsys.readouterr().err
    assert what in said
    assert "--help` shows the options" in said
    assert said.count("\n") == 1


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


@pytest.mark.parametrize("words", [["topology", "show", "torus(4, 8)"], ["--help"], ["demo", "--help"], ["docs"]])
def test_a_reader_that_goes_is_no_error(words: list[str], tmp_path: Path) -> None:
    """As in `trainkit topology show ... | head -1`, with a reader that is gone before the first line."""
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run(
        [sys.executable, "-m", "trainkit", *words], cwd=tmp_path, stdout=writing, stderr=subprocess.PIPE, timeout=280
    )
    os.close(writing)
    assert done.stderr == b""
    assert done.returncode in (0, 1, 141)  # argparse makes it 0, rich 1


def test_a_missing_package_is_one_line_with_its_command(tmp_path: Path) -> None:
    done = trainkit("demo", "--out", "run", cwd=tmp_path, without=("torch",))
    assert done.returncode == 2
    assert "needs the Python package torch, which is not installed: pip install 'torch>=" in done.stderr
    assert done.stderr.count("\n") == 1


MATRIX = '{"hosts": ["a", "b", "c"], "cost": [[0, 1, 2], [1, 0, 3], [2, 3, 0]]}'


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["plan", "--topology", "network.json"], "optimal"),
        (["order", "matrix.json"], "proved optimal"),
        (["topology", "find", "--nodes", "6", "--degree", "2", "--seconds", "1"], "over all sizes"),
        (["topology", "show", "torus(2, 2)"], "all-reduce of 1 GiB"),
        (["probe", "--rendezvous", "127.0.0.1:1", "--hosts", "4", "--dry-run"], "4 hosts"),
        (["check", "switch", "collectives"], "passed"),
        (["docs"], "how-it-works/switchml"),
    ],
)
def test_a_host_without_torch(words: list[str], says: str, tmp_path: Path) -> None:
    """What the hosts of a network need, runs where torch and Lightning are not installed."""
    (tmp_path / "network.json").write_text(NETWORK.read_text())
    (tmp_path / "matrix.json").write_text(MATRIX)
    done = trainkit(*words, cwd=tmp_path, without=("torch", "pytorch_lightning"))
    assert done.returncode == 0, done.stderr
    assert says in done.stdout


def test_a_switch_runs_without_torch(tmp_path: Path) -> None:
    code = BLOCKED.format(packages=("torch", "pytorch_lightning", "scipy", "matplotlib"))
    code += "from trainkit.cli import main; main(['switch', '--listen', '127.0.0.1:0', '--insecure', '--json'])"
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True) as switch:
        assert switch.stdout is not None
        line = switch.stdout.readline()
        switch.terminate()
    assert "127.0.0.1:" in line
    assert switch.returncode == 0


def test_p4_without_torch_says_what_is_wrong_with_the_file(tmp_path: Path) -> None:
    (tmp_path / "workers.yaml").write_text("switch: 1\n")
    done = trainkit("p4", "status", "workers.yaml", cwd=tmp_path, without=("torch", "pytorch_lightning"))
    assert done.returncode == 2
    assert done.stderr.startswith("trainkit p4 status: ")
    assert done.stderr.count("\n") == 1
