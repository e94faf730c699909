"""Docs tell the truth: their code and commands run, print what they show, their links, files, tables and names exist."""

import ast
import importlib
import inspect
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from docs_pages import WIDTH, Page, differs, readers_names
from paths import ROOT

from trainkit.cli._main import _SUBCOMMANDS, _find

DOCS = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "SECURITY.md",
    ROOT / "CHANGELOG.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PAGES = [*DOCS, *sorted((ROOT / "benchmarks").rglob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
RUNS = [
    name
    for name in NAMES[: len(DOCS)]
    if any(block.language in ("python", "console") for block in Page(ROOT / name).blocks)
]
TREE = re.compile(
    r"`((?:autolrs|switchml|collectives|kernels|p4|trainkit|tests|benchmarks|docs|examples|\.ci)/[\w./*-]*)`"
)


def _run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, *, processes: bool) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("COLUMNS", WIDTH)
    page = Page(ROOT / name)
    with readers_names(page.path.read_text()) as names:
        stale = [*filter(None, map(differs, page.run(folder, names, processes=processes)))]
    assert not stale, f"python tests/support/docs_pages.py {name} rewrites it:\n" + "\n".join(stale)


@pytest.mark.parametrize("name", RUNS)
def test_code_runs_and_prints_what_is_shown(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(name, tmp_path, monkeypatch, processes=False)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", [name for name in RUNS if Page(ROOT / name).starts_processes])
def test_jobs_run_and_print_what_is_shown(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(name, tmp_path, monkeypatch, processes=True)


@pytest.mark.parametrize("name", NAMES)
def test_commands_parse(name: str) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)
    extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split("[project.optional")[1], re.M)
    for line in Page(ROOT / name).commands():
        words = shlex.split(line.removesuffix("&"), comments=True)
        words = [word for word in words if not re.fullmatch(r"[A-Z_]+=\S*", word) and word != "sudo"]
        if ">" in words:
            words = words[: words.index(">")]
        if "--no-python" in words:  # torchrun ... --no-python trainkit probe ...
            words = words[words.index("--no-python") + 1 :]
        if not words:
            continue
        if words[0].endswith("trainkit"):
            found = _find(words[1:])
            assert found or words[1] in ("--version", "--help"), f"no subcommand: {line}"
            if found and not {"-h", "--help"} & set(words):
                # a flag that is gone, a value that does not parse: SystemExit
                importlib.import_module(_SUBCOMMANDS[found[0]]).SUBCOMMAND.parser().parse_args(found[1])
        elif words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= set(targets), f"no target: {line}"
        elif words[:2] == ["pip", "install"]:
            asked = re.findall(r"\.\[([\w,]+)\]", line)
            assert {extra for list_ in asked for extra in list_.split(",")} <= set(extras), f"no extra: {line}"
        elif words[0] in ("python", "python3", "torchrun") or words[0].endswith("/python"):
            scripts = [word for word in words if word.endswith(".py")]
            assert all((ROOT / script).exists() for script in scripts if "/" in script), line


@pytest.mark.parametrize("name", NAMES)
def test_code_compiles_and_imports(name: str) -> None:
    for block in Page(ROOT / name).blocks:
        if block.language == "python":
            check_imports(block.code)


@pytest.mark.parametrize("script", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "examples").glob("*.py")))
def test_examples_import_what_exists(script: str) -> None:
    check_imports((ROOT / script).read_text())


EXAMPLES = {path.name: ast.get_docstring(ast.parse(path.read_text())) for path in (ROOT / "examples").glob("*.py")}


@pytest.mark.parametrize("script", sorted(EXAMPLES))
def test_examples_say_how_they_are_run(script: str) -> None:
    assert how_to_run(script)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("script", sorted(EXAMPLES))
def test_examples_run(script: str, tmp_path: Path) -> None:
    """Each example by the commands of its own docstring."""
    page = tmp_path / "page.md"
    page.write_text("```console\n" + "".join(f"$ {line}\n" for line in how_to_run(script)) + "```\n")
    Page(page).run(tmp_path, {})


def how_to_run(script: str) -> list[str]:
    """The commands in an example's docstring, without words in brackets; a folder is the test's own."""
    text = EXAMPLES[script] or ""
    lines = re.findall(
        rf"((?:python|torchrun)[^\n`]*examples/{script}[^\n`.]*(?:\.\w+[^\n`.]*)*|trainkit switch &)", text
    )
    return [re.sub(r" \[[^]]*\]", "", line).replace("FOLDER", ".").strip() for line in lines]


def check_imports(code: str) -> None:
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


@pytest.mark.parametrize("name", NAMES[: len(DOCS)])
def test_files_that_are_named_exist(name: str) -> None:
    missing = [path for path in TREE.findall((ROOT / name).read_text()) if not list(ROOT.glob(path.rstrip("/")))]
    assert not missing


TABLE = re.compile(r"<!-- arguments of (trainkit(?:\.\w+)*)\.(\w+) -->\n\n((?:\|.*\n)+)")
TABLES = [(name, *found) for name in NAMES for found in TABLE.findall((ROOT / name).read_text())]


@pytest.mark.parametrize(("name", "module", "thing", "table"), TABLES, ids=[f"{t[0]}:{t[2]}" for t in TABLES])
def test_tables_of_arguments(name: str, module: str, thing: str, table: str) -> None:
    """The first column has every argument, in any order; the last its default, where that is a value."""
    signature = inspect.signature(getattr(importlib.import_module(module), thing))
    known = {a.name: a.default for a in signature.parameters.values() if a.kind is not a.VAR_KEYWORD}
    rows = [[cell.strip() for cell in row.strip("|\n").split("|")] for row in table.splitlines()[2:]]
    named = {argument: row[-1] for row in rows for argument in re.findall(r"`(\w+)`", row[0])}
    assert set(named) == set(known)
    for argument, shown in named.items():
        value = known[argument]
        if re.fullmatch(r"`.*`", shown) or isinstance(value, int | float | str):
            assert shown.strip("`") == (f'"{value}"' if isinstance(value, str) else f"{value:g}"), argument


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mkdocs")
    built = tmp_path_factory.mktemp("site")
    command = ["mkdocs", "build", "--strict", "--site-dir", str(built)]
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return built


def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(?:https?:)?//[^\s\"'>]+"
        r"|<link[^>]*rel=[\"']?(?:stylesheet|preconnect|icon|preload)[^>]*href=[\"']?(?:https?:)?//[^\s\"'>]+"
        r"|(?:url\(|@import\s+)[\"']?(?:https?:)?//[^\s\"')]+"
    )
    files = [*site.rglob("*.html"), *site.rglob("*.css")]
    assert len(files) > 40
    assert not {found for file in files for found in loads.findall(file.read_text())}


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    shown = "".join(page.read_text() for page in (site / "reference").glob("*.html"))
    packages = [
        ROOT / "trainkit",
        *(ROOT / "trainkit" / name for name in ("autolrs", "switchml", "kernels", "serving")),
    ]
    packages += [path.parent for path in (ROOT / "trainkit" / "collectives").rglob("__init__.py")]
    for package in packages:
        if any(part.startswith("_") for part in package.relative_to(ROOT).parts):
            continue
        for node in ast.walk(ast.parse((package / "__init__.py").read_text())):
            for alias in node.names if isinstance(node, ast.ImportFrom) else ():
                if alias.name == alias.asname:
                    assert re.search(rf'id="trainkit(?:\.\w+)*\.{alias.name}"', shown), f"{package.name}.{alias.name}"


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
