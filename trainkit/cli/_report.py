"""`trainkit report`: a page that shows runs, or their numbers."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from trainkit.cli._subcommand import Subcommand


@dataclass(frozen=True)
class Options:
    """Options of the report."""

    runs: tuple[str, ...] = field(default=(), metadata={"positional": True})
    """folders of runs (each has a run.json), or folders of such folders; the runs stand side by side"""
    out: Path = Path("report.html")
    """HTML file to write"""
    json: bool = False
    """print the report's numbers as JSON instead"""


def run(options: Options) -> int:
    """Write the report."""
    from trainkit._files import write_text_atomically
    from trainkit.report import Run, report, summary

    found = [Run.load(folder) for name in options.runs for folder in _folders(Path(name))]
    if not found:
        raise ValueError("a report needs at least one run, got none: name the folder that a run reported")
    if options.json:
        print(json.dumps([summary(one) for one in found], indent=1))
        return 0
    write_text_atomically(options.out, report(found))
    print(options.out)
    return 0


def _folders(folder: Path) -> list[Path]:
    """The folder itself if it holds a run (or nothing at all, for `Run.load` to refuse), else the runs in it."""
    inside = [] if (folder / "run.json").exists() else sorted(path.parent for path in folder.glob("*/run.json"))
    return inside or [folder]


SUBCOMMAND = Subcommand(
    name="report",
    summary="Write one self-contained HTML page that shows a run, or several side by side.",
    options=Options,
    run=run,
    example="trainkit report runs/demo --out demo.html",
)
