"""Docs tell the truth: their commands parse with today's flags, their code compiles and imports, their links exist."""

import ast
import importlib
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
from paths import ROOT

from trainkit.cli._main import _SUBCOMMANDS, _find

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "benchmarks").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for lang, code in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.S) if lang in languages]


def commands(page: Path) -> list[list[str]]:
    lines = [line for code in blocks(page, "sh", "bash", "console") for line in code.replace("\\\n", " ").splitlines()]
    return [shlex.split(line.removeprefix("$ "), comments=True) for line in lines if line.strip()]


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str) -> None:
    for words in commands(ROOT / name):
        words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word) and word not in ("sudo", "&")]
        if not words:
            continue
        if words[0].endswith("trainkit"):
            found = _find(words[1:])
            assert found or words[1] in ("--version", "--help"), f"no subcommand: {' '.join(words)}"
            if found and not {"-h", "--help"} & set(words):
                # a flag that is gone, a value that does not parse: SystemExit
                importlib.import_module(_SUBCOMMANDS[found[0]]).SUBCOMMAND.parser().parse_args(found[1])
        elif words[0] == "make":
            targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
            assert set(words[1:]) <= set(targets), f"no target: {' '.join(words)}"
        elif words[0] in ("python", "python3", "torchrun") or words[0].endswith("/python"):
            scripts = [word for word in words if word.endswith(".py")]
            assert all((ROOT / script).exists() for script in scripts if "/" in script), " ".join(words)


@pytest.mark.parametrize("name", NAMES)
def test_code_compiles_and_imports(name: str) -> None:
    for code in blocks(ROOT / name, "python", "py"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("trainkit"):
                module = importlib.import_module(node.module)
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {missing}"


@pytest.mark.parametrize("name", NAMES)
def test_links_exist(name: str) -> None:
    page = ROOT / name
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("script", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "examples").glob("*.py")))
def test_examples_import_what_exists(script: str) -> None:
    for node in ast.walk(ast.parse((ROOT / script).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("trainkit"):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_readme_from_a_clean_checkout(tmp_path: Path) -> None:
    """`make demo` on a fresh copy, in its own virtual environment."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, tracked.decode().split("\0")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name, follow_symlinks=False)
    done = subprocess.run(["make", "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "runs" / "demo" / "report.html").exists()
