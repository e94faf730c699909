"""The demo's report."""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainkit.report import _figures as figures
from trainkit.report._page import figure, page, section, table


def _rows(path: Path) -> list[dict[str, float]]:
    with path.open() as file:
        return [{name: float(cell or "nan") for name, cell in row.items()} for row in csv.DictReader(file)]


def demo_report(folder: Path, labels: Mapping[str, str]) -> str:
    """The HTML of a finished demo run.

    Args:
        folder: of the run: `config.json`, and `result.json` and `metrics.csv` of each arm.
        labels: arm to what it is called.

    Raises:
        ValueError: the run is not finished.
    """
    missing = [arm for arm in labels if not (folder / arm / "result.json").exists()]
    if missing:
        raise ValueError(
            f"a report needs a finished run, {folder} has no result of {', '.join(missing)}: resume it first"
        )
    config = json.loads((folder / "config.json").read_text())
    results = {arm: json.loads((folder / arm / "result.json").read_text()) for arm in labels}
    rows = {arm: _rows(folder / arm / "metrics.csv") for arm in labels}
    ours, history = rows["autolrs"], results["autolrs"]["history"]
    retransmissions = ours[-1]["retransmissions"]
    return page(
        "Trainkit demo",
        f"a byte-level GPT of {results['autolrs']['parameters']:,} parameters on the standard library's source text, "
        f"{config['workers']} workers ({config['accelerator']}), {config['steps']} optimiser steps an arm, "
        f"seed {config['seed']}",
        [
            section(
                "Result",
                "Bits a byte on held-out files after equal optimiser steps; steps of trials that were thrown away are counted.",
                _result_table(results, labels),
            ),
            section(
                "Loss",
                "Thin: training batches of rank 0. Dots: held-out batches.",
                figure(figures.losses({arm: (label, rows[arm]) for arm, label in labels.items()})),
            ),
            section(
                "Learning rate",
                f"The rate of each kept step, and every trial with the forecast of its loss (bars: two standard deviations). "
                f"{history['extra_forwards']} forward passes were made only to measure search losses; searches took "
                f"{history['search_seconds']:.0f} s.",
                figure(figures.staircase(ours, history)),
            ),
            section(
                "Network",
                f"What rank 0 exchanged with the switch, searches included: {retransmissions:.0f} retransmissions.",
                figure(figures.network(ours)),
            ),
            section(
                "Step time",
                "Where a kept step's time went on rank 0; steps of a kept trial were taken in the search and cost nothing here.",
                figure(figures.step_time(ours)),
            ),
        ],
    )


def _result_table(results: Mapping[str, Mapping[str, Any]], labels: Mapping[str, str]) -> str:
    lines = [
        (
            label,
            f"{results[arm]['val_bits']:.3f}",
            str(results[arm]["kept_steps"]),
            str(results[arm]["history"]["discarded_steps"] if results[arm]["history"] else 0),
            f"{results[arm]['seconds']:.0f}",
        )
        for arm, label in labels.items()
    ]
    bits = [results[arm]["val_bits"] for arm in labels]
    return table(("arm", "bits a byte", "kept steps", "discarded", "seconds"), lines, best=bits.index(min(bits)))
