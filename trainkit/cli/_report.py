"""`trainkit report`: write a run's report again."""

from dataclasses import dataclass
from pathlib import Path

from trainkit.cli._subcommand import Subcommand


@dataclass(frozen=True)
class Options:
    """Options of the report."""

    run: Path = Path("runs/demo")
    """folder of a finished demo run"""
    out: Path | None = None
    """HTML file to write; default: report.html in the run's folder"""


def run(options: Options) -> int:
    """Write the report."""
    from trainkit._files import write_text_atomically
    from trainkit.demo import ARMS
    from trainkit.report import demo_report

    out = options.out or options.run / "report.html"
    write_text_atomically(out, demo_report(options.run, ARMS))
    print(out)
    return 0


SUBCOMMAND = Subcommand(
    name="report",
    summary="Write the self-contained HTML report of a finished run.",
    options=Options,
    run=run,
    example="trainkit report --run runs/demo --out demo.html",
)
