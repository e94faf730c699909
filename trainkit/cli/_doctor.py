"""`trainkit doctor`: what is here, what is missing for which part, and the command that brings it."""

import json
import os
import platform
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from typing import Any

from trainkit.cli._subcommand import Subcommand, did_you_mean

_PACKAGES = (
    "trainkit-systems", "torch", "pytorch-lightning", "numpy", "scipy", "scikit-optimize", "networkx", "jsonargparse",
    "rich", "matplotlib", "triton", "p4runtime-shell", "litserve",
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Options of the report."""

    parts: tuple[str, ...] = field(default=(), metadata={"positional": True})
    """parts to look at, such as training or p4: exit code 1 if one of them is missing; without any, all"""
    json: bool = False
    """print JSON"""


def _report(parts: Collection[str]) -> dict[str, Any]:
    from trainkit.cli._findings import findings, interfaces, torch_facts, version

    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": os.cpu_count(),
        "packages": {name: version(name) for name in _PACKAGES},
        "gpus": torch_facts()["gpus"] if "kernels" in parts else [],
        "interfaces": interfaces(),
        "parts": [{"part": part, **asdict(finding)} for part, finding in findings(parts).items()],
    }


def _show(report: dict[str, Any]) -> None:
    print(f"Python {report['python']} on {report['system']}, {report['cores']} cores")
    print(", ".join(f"{name} {version}" for name, version in report["packages"].items() if version))
    for gpu in report["gpus"]:
        print(f"GPU {gpu['name']}, {gpu['memory_gib']} GiB, {gpu['arch']}")
    for link in report["interfaces"]:
        speed = f", {link['mbit_per_s']} Mbit/s" if link["mbit_per_s"] else ""
        print(f"network {link['name']}: {link['state']}, MTU {link['mtu']}{speed}")
    rows = [(part["part"], "yes" if part["ok"] else "no", part["what"], part["fix"]) for part in report["parts"]]
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        for row in rows:
            print("  ".join(row).rstrip())
        return
    table = Table("part", "here", "found", "fix")
    for part, here, *rest in rows:
        table.add_row(part, Text(here, "green" if here == "yes" else "yellow"), *map(Text, rest))
    Console(soft_wrap=True).print(table)


def run(options: Options) -> int:
    """Look and print; 1 where a part that was asked for is missing."""
    from trainkit.cli._findings import LOOKS

    for asked in options.parts:
        if asked not in LOOKS:
            raise ValueError(f"a part is one of {', '.join(LOOKS)}, got {asked!r}{did_you_mean(asked, list(LOOKS))}")
    report = _report(options.parts or LOOKS)
    if options.json:
        print(json.dumps(report, indent=1))
    else:
        _show(report)
    return int(bool(options.parts) and not all(part["ok"] for part in report["parts"]))


SUBCOMMAND = Subcommand(
    name="doctor",
    summary="Show versions, GPUs and network, and what is missing for which part with the command that brings it.",
    options=Options,
    run=run,
    example="trainkit doctor training switchml --json",
)
