"""The house: what is shipped, what an import loads, which way the arrows point."""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import re
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
from paths import ROOT

import trainkit

FACES = [
    "trainkit",
    "trainkit.autolrs",
    "trainkit.switchml",
    "trainkit.collectives",
    "trainkit.kernels",
    "trainkit.serving",
]


def python(code: str, cwd: Path) -> str:
    """Standard output of `code` in a fresh interpreter that has no repository on its path."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_nothing_is_unpickled() -> None:
    """What comes over a network is JSON, a fixed struct, or tensors; torch's object collectives unpickle."""
    unpickles = re.compile(
        r"\b(import (c?pickle|marshal|shelve|dill|joblib)\b|\w+_object(_list)?\(|allow_pickle=True|yaml\.(unsafe_)?load\()"
        r"|torch\.load\((?!.*weights_only=True)"
    )
    found = {
        str(file.relative_to(ROOT))
        for folder in ("autolrs", "switchml", "collectives", "kernels", "p4", "trainkit")
        for file in (ROOT / folder).rglob("*.py")
        if unpickles.search(file.read_text().replace("parse_from_object(", ""))
    }
    assert found == set()


def needs(module: str) -> None:
    if importlib.util.find_spec(module) is None:
        pytest.skip(f"needs the Python package {module}: pip install '.[test,p4]'")


def all_modules() -> list[str]:
    # the demo's worker and `python -m trainkit` are programs
    programs = ("trainkit.__main__",)
    found = ["trainkit", *(m.name for m in pkgutil.walk_packages(trainkit.__path__, "trainkit."))]
    return [name for name in found if name not in programs]


def test_import_is_light(tmp_path: Path) -> None:
    loaded = python("import sys, trainkit; print(*sys.modules)", tmp_path).split()
    assert not {"torch", "pytorch_lightning", "lightning", "scipy", "matplotlib"} & set(loaded)


@pytest.mark.parametrize("name", ["AutoLRS", "SwitchMLStrategy"])
def test_lazy_names_arrive(name: str) -> None:
    assert getattr(trainkit, name).__name__ == name
    assert name in dir(trainkit)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'AutoLR'"):
        _ = trainkit.AutoLR


def test_no_module_hides_a_public_name() -> None:
    """A sub-module called like a public function replaces it on the package when it is imported later."""
    before = {(face, name): getattr(importlib.import_module(face), name) for face in FACES for name in public(face)}
    for name in all_modules():
        importlib.import_module(name)
    for (face, name), value in before.items():
        assert getattr(importlib.import_module(face), name) is value, f"{face}.{name} changed"
        assert not isinstance(value, types.ModuleType) or face == "trainkit", f"{face}.{name} is a module"


def public(face: str) -> list[str]:
    module = importlib.import_module(face)
    listed = getattr(module, "__all__", None)
    names = listed if listed is not None else [name for name in vars(module) if not name.startswith("_")]
    sub_packages = {m.name for m in pkgutil.iter_modules(module.__path__)}
    return [name for name in names if name not in sub_packages or name in (listed or ())]


def test_every_module_is_private_or_a_package() -> None:
    for name in all_modules():
        leaf = name.rsplit(".", 1)[-1]
        spec = importlib.util.find_spec(name)
        is_package = spec is not None and spec.submodule_search_locations is not None
        assert is_package or leaf.startswith("_") or name.startswith("trainkit.p4"), f"{name} should be private"


@pytest.mark.parametrize("engine", ["switchml", "collectives", "serving"])
def test_native_core_is_installed(engine: str) -> None:
    native = importlib.import_module(f"trainkit.{engine}._native")
    assert native.__file__.endswith(".so")
    assert [name for name in dir(native) if not name.startswith("_")]


def test_hugging_face_kernels_and_p4runtime_keep_their_names(tmp_path: Path) -> None:
    for module in ("kernels", "p4", "transformers"):
        needs(module)
    said = python(
        "import trainkit.kernels, kernels; print(kernels.__file__)\n"
        "from p4.v1 import p4runtime_pb2\n"
        "import transformers; from transformers import GPT2LMHeadModel\n"
        "import trainkit; print(trainkit.__file__)",
        tmp_path,
    ).split()
    assert "site-packages" in said[0]
    assert str(ROOT / "kernels") not in said[0]


def test_the_repository_root_is_not_on_the_path() -> None:
    assert str(ROOT) not in sys.path
    assert not (ROOT / "p4" / "__init__.py").exists()


def test_of_the_tests_only_support_is_on_the_path() -> None:
    """Else `tests/kernels` and `tests/p4` would be the packages `kernels` and `p4`."""
    entries = [Path(entry).resolve() for entry in sys.path]
    ours = [entry for entry in entries if entry.is_relative_to(ROOT / "tests")]
    assert set(ours) == {ROOT / "tests" / "support"}


def test_what_is_installed_is_trainkit_alone() -> None:
    names = [str(path) for path in importlib.metadata.files("trainkit-systems") or ()]
    if "trainkit/__init__.py" not in names:
        pytest.skip("needs an install that is not editable: make setup")
    inside = [name for name in names if not name.startswith("..")]  # the program goes to bin/
    tops = {name.split("/")[0] for name in inside}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"trainkit"}
    assert {"trainkit/p4/build/switchml.json", "trainkit/p4/build/switchml.p4info.txtpb"} <= set(names)
    for engine in ("autolrs", "switchml", "collectives", "kernels", "serving"):
        assert f"trainkit/{engine}/__init__.py" in names
    for engine in ("switchml", "collectives", "serving"):
        assert any(name.startswith(f"trainkit/{engine}/_native.") and name.endswith(".so") for name in names)
        assert f"trainkit/{engine}/_native.pyi" in names
    assert "trainkit/py.typed" in names
    assert "trainkit/docs/how-it-works/network.md" in names  # `trainkit docs`
    assert not [name for name in names if name.endswith((".cpp", ".hpp", "CMakeLists.txt"))]


def test_nobody_is_sent_to_a_strangers_package() -> None:
    """On the registry `trainkit` is somebody else's distribution; ours is trainkit-systems."""
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, check=True, text=True).stdout.split()
    old = re.compile(r"\btrainkit\[|pip3? (?:install|download)\b[^\n`'\"]*['\" ]trainkit(?![-\w/.])")
    assert (
        old.search("pip install -U 'trainkit'") and old.search("pip install trainkit") and old.search("'trainkit[p4]'")
    )
    assert not old.search("pip install trainkit-systems")
    here = "tests/trainkit/test_house.py"
    found = [
        name for name in tracked
        if name != here and (ROOT / name).is_file() and old.search((ROOT / name).read_text(errors="ignore"))
    ]  # fmt: skip
    assert not found


def run_tool(*words: str) -> None:
    if shutil.which(words[0], path=str(Path(sys.executable).parent)) is None:
        pytest.skip(f"needs {words[0]}: pip install '.[test]'")
    tool = Path(sys.executable).parent / words[0]
    done = subprocess.run([tool, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def test_arrows_point_down() -> None:
    run_tool("lint-imports", "--no-cache")


def test_files_stay_small() -> None:
    tracked = subprocess.run(
        ["git", "ls-files", "*.py", "*.cpp", "*.hpp", "*.h"], cwd=ROOT, capture_output=True, check=True, text=True
    ).stdout.split()
    sizes = sorted(len((ROOT / name).read_text().splitlines()) for name in tracked if (ROOT / name).exists())
    assert sizes[-1] <= 500
    shipped = [len((ROOT / n).read_text().splitlines()) for n in tracked if not n.startswith("tests/")]
    assert sorted(shipped)[len(shipped) // 2] <= 150
