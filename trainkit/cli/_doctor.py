"""`trainkit doctor`: what is here, what is missing for which part, and the command that mends it."""

import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

from trainkit.cli._verb import Verb

_PACKAGES = (
    "trainkit", "torch", "pytorch-lightning", "numpy", "scipy", "scikit-optimize", "networkx", "jsonargparse", "rich",
    "matplotlib", "triton", "p4runtime-shell", "litserve",
)  # fmt: skip
# released by somebody who had stolen the project's keys
_COMPROMISED = ("2.6.2", "2.6.3")
_RECEIVE_BUFFER = 4 << 20


@dataclass(frozen=True)
class Options:
    """Options of the report."""

    json: bool = False
    """print JSON"""


@dataclass(frozen=True)
class Finding:
    """One part of Trainkit and whether it can run here."""

    part: str
    ok: bool
    what: str
    mend: str = ""


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _native(engine: str) -> Finding:
    part = f"{engine} native core"
    try:
        importlib.import_module(f"trainkit.{engine}._native")
    except ImportError as error:
        return Finding(part, False, str(error), "pip install --force-reinstall --no-deps trainkit  # needs g++")
    return Finding(part, True, "loads")


def _package(part: str, package: str, mend: str) -> Finding:
    version = _version(package)
    return Finding(part, version is not None, f"{package} {version or 'is missing'}", "" if version else mend)


def _programs(part: str, names: tuple[str, ...], mend: str) -> Finding:
    missing = [name for name in names if shutil.which(name) is None]
    what = f"{', '.join(missing)} not on PATH" if missing else f"{', '.join(names)} on PATH"
    return Finding(part, not missing, what, mend if missing else "")


def _lightning() -> Finding:
    version = _version("pytorch-lightning")
    good = version is not None and version not in _COMPROMISED
    what = f"pytorch-lightning {version or 'is missing'}"
    return Finding("training", good, what, "" if good else "pip install 'pytorch-lightning>=2.6.4'")


def _receive_buffer() -> Finding:
    path = Path("/proc/sys/net/core/rmem_max")
    limit = int(path.read_text()) if path.exists() else 0
    good = limit >= _RECEIVE_BUFFER
    mend = "" if good else f"sudo sysctl -w net.core.rmem_max={_RECEIVE_BUFFER}  # more packets in flight"
    return Finding("switchml at full window", good, f"net.core.rmem_max is {limit}", mend)


def _gpus() -> tuple[list[dict[str, object]], Finding]:
    import torch

    found: list[dict[str, object]] = []
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        capability = f"sm_{device.major}{device.minor}"
        found.append({"name": device.name, "memory_gib": round(device.total_memory / 2**30, 1), "arch": capability})
    if found:
        return found, Finding(
            "fused kernels", _version("triton") is not None, "GPU found", "pip install 'trainkit[kernels]'"
        )
    built = f"torch was built for CUDA {torch.version.cuda}" if torch.version.cuda else "torch is a CPU build"
    return found, Finding("fused kernels", False, f"no CUDA device ({built}): attention runs in plain PyTorch")


def _interfaces() -> list[dict[str, object]]:
    found: list[dict[str, object]] = []
    for link in sorted(Path("/sys/class/net").glob("*")):
        try:
            state, mtu = (link / "operstate").read_text().strip(), int((link / "mtu").read_text())
        except (OSError, ValueError):
            continue
        try:
            speed: int | None = int((link / "speed").read_text())
        except (OSError, ValueError):
            speed = None
        found.append({"name": link.name, "state": state, "mtu": mtu, "mbit_per_s": speed if (speed or 0) > 0 else None})
    return found


def _report() -> dict[str, object]:
    gpus, kernels = _gpus()
    findings = [
        _lightning(),
        *(_native(engine) for engine in ("switchml", "collectives")),
        kernels,
        _receive_buffer(),
        _package("p4 deployment", "p4runtime-shell", "pip install 'trainkit[p4]'"),
        _programs("p4 software switch", ("p4c-bm2-ss", "simple_switch_grpc"), "install p4c and bmv2 from p4lang"),
        _package("serving", "litserve", "pip install 'trainkit[serve]'"),
        _programs("network benchmarks", ("ip", "tc"), "sudo apt install iproute2"),
    ]
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "gpus": gpus,
        "interfaces": _interfaces(),
        "parts": [asdict(finding) for finding in findings],
    }


def _show(report: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(soft_wrap=True)
    console.print(f"Python {report['python']} on {report['system']}, {report['cores']} cores")
    packages: dict[str, str | None] = report["packages"]  # type: ignore[assignment]
    console.print(", ".join(f"{name} {version}" for name, version in packages.items() if version))
    for gpu in report["gpus"]:  # type: ignore[attr-defined]
        console.print(f"GPU {gpu['name']}, {gpu['memory_gib']} GiB, {gpu['arch']}")
    for link in report["interfaces"]:  # type: ignore[attr-defined]
        speed = f", {link['mbit_per_s']} Mbit/s" if link["mbit_per_s"] else ""
        console.print(f"network {link['name']}: {link['state']}, MTU {link['mtu']}{speed}")
    table = Table("part", "", "found", "mend")
    for finding in report["parts"]:  # type: ignore[attr-defined]
        mark = "[green]yes[/green]" if finding["ok"] else "[yellow]no[/yellow]"
        table.add_row(finding["part"], mark, finding["what"], finding["mend"].replace("[", "\\["))
    console.print(table)


def run(options: Options) -> int:
    """Look and print."""
    report = _report()
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        _show(report)
    return 0


VERB = Verb(
    name="doctor",
    summary="Print versions, GPUs and network, and what is missing for which part with the command that mends it.",
    options=Options,
    run=run,
    example="trainkit doctor --json",
)
