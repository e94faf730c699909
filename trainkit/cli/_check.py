"""`trainkit check`: a self-test, of two processes at most, of everything that can run on this machine."""

import json
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainkit.cli._subcommand import Subcommand, did_you_mean


@dataclass(frozen=True)
class Options:
    """Options of the self-test."""

    checks: tuple[str, ...] = field(default=(), metadata={"positional": True})
    """checks to run, of switch, collectives, switchml, forest, attention, autolrs and p4: exit code 1 where one of them
    cannot run here; without any, all that can"""
    timeout_s: float = 120.0
    """seconds after which one check has failed"""
    json: bool = False
    """print JSON"""


def run(options: Options) -> int:
    """Run the checks one after the other; 1 where one fails, or was asked for and cannot run."""
    from trainkit.check import CHECKS, check
    from trainkit.cli._findings import findings

    for asked in options.checks:
        if asked not in CHECKS:
            raise ValueError(f"a check is one of {', '.join(CHECKS)}, got {asked!r}{did_you_mean(asked, list(CHECKS))}")
    if not 0 < options.timeout_s <= 3600:
        raise ValueError(f"--timeout-s must be seconds above 0 and up to 3600, got {options.timeout_s}")
    chosen = options.checks or tuple(CHECKS)
    found = findings({part for name in chosen for part in CHECKS[name].needs})
    rows: list[dict[str, Any]] = []
    for name in chosen:
        missing = [found[part] for part in CHECKS[name].needs if not found[part].ok]
        row: dict[str, Any] = {"check": name, "shows": CHECKS[name].shows}
        if missing:
            row |= {"result": "not here", "why": missing[0].what, "fix": missing[0].fix}
        else:
            with tempfile.TemporaryDirectory(prefix="trainkit-check-") as folder:
                why, seconds = check(name, Path(folder), options.timeout_s)
            row |= {"result": "failed" if why else "passed", "why": why, "seconds": round(seconds, 1)}
        rows.append(row)
        if not options.json:
            _show(row)
    if options.json:
        print(json.dumps(rows, indent=1))
    bad = {"failed", "not here"} if options.checks else {"failed"}
    return int(any(row["result"] in bad for row in rows))


def _show(row: dict[str, Any]) -> None:
    seconds = f"{row['seconds']:5.1f} s" if "seconds" in row else " " * 7
    print(f"{row['check']:12} {row['result']:9} {seconds}  {row['why'] or row['shows']}", flush=True)
    if row.get("fix"):
        print(f"{'':31}  {row['fix']}", flush=True)


SUBCOMMAND = Subcommand(
    name="check",
    summary="Let each part that can run on this machine do its work once, and compare with what it must give.",
    options=Options,
    run=run,
    example="trainkit check switch collectives",
)
