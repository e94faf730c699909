"""`trainkit doctor` and `trainkit check` on machines where something is missing, broken or hangs."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

import trainkit
from trainkit.check import CHECKS, check
from trainkit.cli._findings import LOOKS
from trainkit.cli._main import main


def run(*words: str, path: Path) -> "subprocess.CompletedProcess[str]":
    """`trainkit WORDS` with the folder `path` before all others, in the processes that it starts, too."""
    return subprocess.run(
        [sys.executable, "-m", "trainkit", *words],
        cwd=path, env={**os.environ, "PYTHONPATH": str(path)}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip


def missing(part: str, path: Path) -> dict[str, Any]:
    """The row of a part that is asked for and missing."""
    done = run("doctor", "--json", part, path=path)
    assert done.returncode == 1, done.stderr
    (row,) = json.loads(done.stdout)["parts"]
    assert row["part"] == part and not row["ok"]
    return dict(row)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise ImportError('libcudart.so.12: cannot open shared object file')", "ImportError: libcudart.so.12"),
        ("import os; os.abort()", "takes the interpreter down (SIGABRT)"),
        ("raise SystemExit(3)", "exit code 3"),
    ],
)
def test_a_torch_that_does_not_import_is_a_row(code: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(code)
    found = missing("torch", tmp_path)
    assert found["what"].startswith("torch does not import: ")
    assert says in found["what"]
    assert found["fix"].startswith("pip install --force-reinstall 'torch>=")


def test_doctor_without_parts_shows_all_and_does_not_fail(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('gone')")
    done = run("doctor", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(part in done.stdout for part in LOOKS)
    assert run("doctor", "switchml", path=tmp_path).returncode == 0


def test_checks_that_need_a_broken_torch_are_not_run(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('gone')")
    done = run("check", "--json", "collectives", "forest", path=tmp_path)
    rows = {row["check"]: row for row in json.loads(done.stdout)}
    assert done.returncode == 1
    assert rows["collectives"]["result"] == "passed"
    assert rows["forest"]["result"] == "not here"
    assert "ImportError: gone" in rows["forest"]["why"]


def test_another_distribution_in_our_folder_is_found(tmp_path: Path) -> None:
    """The registry's `trainkit` is somebody else's, and unpacks into the same folder."""
    info = tmp_path / "trainkit-0.0.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: trainkit\nVersion: 0.0.2\n")
    (info / "RECORD").write_text("trainkit/trainer.py,,\ntrainkit-0.0.2.dist-info/RECORD,,\n")
    found = missing("installation", tmp_path)
    assert "but trainkit is installed over the same folder" in found["what"]
    assert found["fix"].startswith("pip uninstall trainkit, then ")


@pytest.mark.parametrize("version", ["2.6.2", "2.6.3"])
def test_a_compromised_lightning_is_named(version: str, tmp_path: Path) -> None:
    info = tmp_path / f"pytorch_lightning-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: pytorch-lightning\nVersion: {version}\n")
    found = missing("training", tmp_path)
    assert "stolen keys" in found["what"]
    assert "!=2.6.2" in found["fix"]


def test_hints_follow_our_metadata() -> None:
    """Every fix that installs a package asks for what pyproject.toml asks for."""
    from trainkit.cli._requirements import pip_install

    wanted = importlib.metadata.requires("trainkit-systems") or []
    for package in ("torch", "pytorch_lightning", "triton", "p4runtime-shell", "skopt", "litserve"):
        name = re.search(r"'([\w-]+)", pip_install(package))
        assert name is not None
        assert any(pip_install(package) == f"pip install '{text.split(';')[0].strip()}'" for text in wanted), package
    assert pip_install("no_such_package") == "pip install 'no-such-package'"


def test_a_check_that_hangs_has_failed(tmp_path: Path) -> None:
    why, seconds = check("switch", tmp_path, 0.001)
    assert "has not ended within 0.001 s" in why
    assert seconds < 30


WRONG = {
    "collectives": ("from trainkit import collectives as c; c.forest = c.optimum", "AttributeError"),
    "attention": (
        "from trainkit import kernels as k; f = k.attention; k.attention = lambda *x, causal: f(*x)",
        "within",
    ),
    "autolrs": ("from trainkit import autolrs as a; f = a.forecast; a.forecast = lambda l, h: f(l, 100)", "must be 1"),
    "forest": ("from trainkit import collectives as c, switchml as s; c.forest_hook = s.noop_hook", "must be within"),
    "switchml": ("from trainkit import switchml as s; s.switchml_hook = s.noop_hook", "must be within"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in ("collectives", "forest"))) for n in WRONG]
)
def test_a_check_that_gives_something_else_fails(name: str, tmp_path: Path) -> None:
    sabotage, why = WRONG[name]
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nif any('trainkit.check._work' in word for word in sys.orig_argv):\n    {sabotage}\n"
    )
    done = run("check", name, "--json", path=tmp_path)
    (row,) = json.loads(done.stdout)
    assert row["result"] == "failed", row
    assert why in row["why"]
    assert done.returncode == 1


@pytest.mark.parametrize("parts", ["switch collectives switchml autolrs", pytest.param("", marks=pytest.mark.slow)])
def test_what_can_run_here_passes(parts: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", *parts.split(), "--json"]) == 0
    rows = {row["check"]: row["result"] for row in json.loads(capsys.readouterr().out)}
    assert list(rows) == (parts.split() or list(CHECKS))
    assert all(result == "passed" for name, result in rows.items() if name != "p4")


PAGE = ROOT / "docs" / "how-to" / "host-without-torch.md"


def test_the_install_for_a_host_without_torch(tmp_path: Path) -> None:
    """The packages that the page names, and nothing else, are enough."""
    named = re.findall(r"^pip install --no-deps (.*)$", PAGE.read_text(), re.M)
    packages = [word for line in named for word in line.split() if word != "."]
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "host"], check=True)
    (site,) = (tmp_path / "host").glob("lib/python*/site-packages")
    for package in packages:
        installed = importlib.metadata.distribution(package)
        for top in {file.parts[0] for file in installed.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(installed.locate_file(top))))
    shutil.copytree(Path(trainkit.__file__).parent, site / "trainkit")
    for engine in ("switchml", "collectives"):
        native = importlib.util.find_spec(f"trainkit.{engine}._native")
        assert native is not None and native.origin is not None
        shutil.copy(native.origin, site / "trainkit" / engine)
    (tmp_path / "network.json").write_text((ROOT / "examples" / "forest_two_islands.json").read_text())
    for words in (
        ["check", "switch", "collectives"], ["plan", "--topology", "network.json"], ["doctor", "switchml", "collectives"],
        ["topology", "find", "--nodes", "8", "--degree", "2", "--seconds", "1"], ["docs"], ["order", "network.json"],
        ["probe", "--rendezvous", "127.0.0.1:1", "--hosts", "2", "--dry-run"], ["switch", "--help"], ["p4", "--help"],
    ):  # fmt: skip
        python = tmp_path / "host" / "bin" / "python"
        done = subprocess.run([python, "-m", "trainkit", *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{words}: {done.stderr}"


def test_a_name_that_is_loopback_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainkit.cli import _findings

    for name, good in (("127.0.0.1", False), ("no.such.name.invalid", False), ("192.0.2.7", True)):
        monkeypatch.setattr(_findings.socket, "gethostname", lambda name=name: name)
        monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
        (found,) = _findings.findings(["several-hosts"]).values()
        assert found.ok is good and ("export GLOO_SOCKET_IFNAME=" in found.fix) is not good
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
        (found,) = _findings.findings(["several-hosts"]).values()
        assert found.ok and "eth7" in found.what
