"""What all tests share: the import path, the markers' requirements, the slow switch."""

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

os.environ["PYTHONSAFEPATH"] = "1"  # the same for the processes that tests start
# `python -m pytest` puts the repository root on sys.path, where `kernels/` and `p4/` would shadow other people's
# packages (tests/trainkit/test_house.py): the installed trainkit is what is tested.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
# What several test files share; the one folder of the tests that is on the path.
sys.path.append(str(ROOT / "tests" / "support"))

# Without a GPU the Triton kernels are tested on Triton's interpreter, which must be asked for before Triton is imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def _missing(marker: str, config: pytest.Config) -> str | None:
    if marker == "slow" and not config.getoption("--slow"):
        return "takes minutes: run with --slow"
    if marker == "netns" and (os.geteuid() != 0 or shutil.which("ip") is None):
        return "needs root and the `ip` command"
    if marker == "p4" and not (shutil.which("p4c-bm2-ss") and shutil.which("simple_switch_grpc")):
        return "needs p4c-bm2-ss and simple_switch_grpc on PATH"
    if marker == "gpu":
        import torch

        return None if torch.cuda.is_available() else "needs a CUDA device"
    return None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        for mark in list(item.iter_markers()):
            reason = _missing(mark.name, config)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def ranks_imports() -> None:
    """Let the ranks' imports, which take seconds, run beside the first tests (not earlier: their output is captured)."""
    if ranks := sys.modules.get("execute_ranks"):
        ranks.preload()
