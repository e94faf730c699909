"""The report of one run, or of several side by side."""

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from trainkit.report._chart import Line, Mark, chart, number
from trainkit.report._page import page, section, table
from trainkit.report._run import PHASES, Run

_PHASES = {
    "forward_s": "forward",
    "backward_s": "backward",
    "network_s": "exposed communication",
    "optimizer_s": "optimiser",
}
_STATUS = {"committed": 0, "finished": 5, "stopped": 7, "diverged": 4}


def report(runs: Sequence[Run], title: str | None = None) -> str:
    """The self-contained HTML of one run or several.

    Args:
        runs: at least one.
        title: of the page, None: the runs' names.

    Raises:
        ValueError: no run.
    """
    if not runs:
        raise ValueError("a report needs at least one run, got none")
    dates = dict.fromkeys(run.started[:16].replace("T", " ") for run in runs if run.started)
    return page(
        title or ", ".join(run.name for run in runs),
        "started " + ", ".join(dates) if dates else "",
        [*_results(runs), *_loss(runs), *_rates(runs), *_step_time(runs), *_network(runs), *_kernels(runs), _surroundings(runs)],
    )  # fmt: skip


def summary(run: Run) -> dict[str, Any]:
    """The report's numbers, JSON-able."""
    phases = _phases(run)
    return {
        "name": run.name,
        "started": run.started,
        "seconds": run.seconds,
        "steps": len(run.columns.get("step", ())),
        **{f"last_{name}": run.column(name)[1][-1] for name in ("loss", "val_loss") if run.column(name)[1]},
        "loss_unit": run.loss_unit,
        "results": dict(run.results),
        "median_step_s": {name: median(values) for name, values in phases.items() if values},
        "search": None if run.search is None else _cost(run.search),
        "counters": run.counters,
        "links": run.links,
        "kernels": [list(row) for row in run.kernels],
        "environment": dict(run.environment),
        "settings": dict(run.settings),
        "command": run.command,
    }


def _results(runs: Sequence[Run]) -> list[str]:
    names = list(dict.fromkeys(name for run in runs for name in run.results))
    header = ["run", "steps", *names, "discarded", "time"]
    rows = [
        [
            run.name,
            str(len(run.columns.get("step", ()))),
            *(_figure(run.results.get(name)) for name in names),
            str(run.search["discarded_steps"]) if run.search else "0",
            _duration(run.seconds),
        ]
        for run in runs
    ]
    about = "Discarded: optimiser steps of trials that were undone again."
    return [section("Result", about, table(header, rows, caption="results"))]


def _loss(runs: Sequence[Run]) -> list[str]:
    several = len(runs) > 1
    lines = []
    for number_, run in enumerate(runs):
        lines.append(
            Line(f"{run.name}, training" if several else "training", *run.column("loss"), colour=number_, faint=True)
        )
    for number_, run in enumerate(runs):
        if run.column("val_loss")[1]:
            lines.append(
                Line(
                    f"{run.name}, held out" if several else "held out",
                    *run.column("val_loss"),
                    kind="dots",
                    colour=number_,
                )
            )
    unit = next((run.loss_unit for run in runs if run.loss_unit), "loss")
    values = sorted(value for line in lines for value in line.y if math.isfinite(value))
    if not values:
        return []
    # a first step or a spike must not flatten everything else: the picture ends where 99 % of the values do
    low, high = values[0], values[int(0.99 * (len(values) - 1))]
    room = 0.06 * (high - low) or abs(high) or 1.0
    drawn = chart("Loss", lines, x="optimiser step", y=unit, y_range=(low - room, high + room))
    return [
        section(
            "Loss", "Thin: training batches of rank 0. Dots: held-out batches. The highest hundredth is cut off.", drawn
        )
    ]


def _rates(runs: Sequence[Run]) -> list[str]:
    lines = [Line(run.name, *run.column("rate"), kind="steps", colour=at) for at, run in enumerate(runs)]
    searched = [run for run in runs if run.search and run.search["trials"]]
    marks = [
        Mark(
            trial["start"],
            trial["rate"],
            _trial_text(trial, run if len(runs) > 1 else None),
            _STATUS[trial["status"]],
            name=trial["status"],
        )
        for run in searched
        for trial in (run.search or {})["trials"]
    ]
    drawn = chart("Learning rate", lines, x="optimiser step", y="learning rate", log_y=True, marks=marks)
    if not searched:
        return (
            [section("Learning rate", "The rate of each optimiser step.", drawn)]
            if any(line.y for line in lines)
            else []
        )
    parts = [drawn]
    for run in searched:
        assert run.search is not None
        parts.append(_trials(run, several=len(searched) > 1))
    rows = []
    for run in searched:
        cost = _cost(run.search or {})
        counts = [str(cost[key]) for key in ("trials", "discarded_steps", "extra_forwards")]
        rows.append([run.name, *counts, _duration(cost["search_seconds"]), cost["reason"]])
    header = ("run", "trials", "steps discarded", "forward passes", "time", "why the last search ended")
    parts.append(table(header, rows, caption="what the search cost"))
    return [
        section(
            "Learning rate",
            "The rate of each kept step, and as dots every rate that a search tried from the same state: point at one, or tab "
            "to it, for what became of it. Below, the losses of each trial and the forecast of the run's loss with two standard "
            "deviations. The last part of a run anneals: the rate falls, and the loss dips below what a "
            "constant rate would reach.",
            *parts,
        )
    ]


def _trials(run: Run, *, several: bool) -> str:
    assert run.search is not None
    lines, marks = [], []
    last = max((trial["horizon"] for trial in run.search["trials"]), default=0)
    beside: dict[int, int] = {}
    for trial in run.search["trials"]:
        colour = _STATUS[trial["status"]]
        measured = [(s, v) for s, v in zip(trial["loss_steps"], trial["losses"], strict=True) if v is not None]
        if measured:
            lines.append(Line("", [s for s, _ in measured], [v for _, v in measured], colour=colour))
        if trial["mean"] is not None and trial["std"] is not None:
            mean, band = trial["mean"], 2 * trial["std"]
            # forecasts of one search are for one step: they stand side by side before it
            place = beside[trial["stage"]] = beside.get(trial["stage"], -1) + 1
            at = trial["horizon"] - 0.02 * last * place
            marks.append(Mark(at, mean, _trial_text(trial), colour, mean - band, mean + band, trial["status"]))
    seen = [v for line in lines for v in line.y] + [mark.y for mark in marks]
    if not seen:
        return ""
    seen.sort()
    low, high = seen[0], seen[int(0.95 * (len(seen) - 1))]
    room = 0.15 * (high - low) or abs(high) or 1.0
    title = f"Trials and forecasts: {run.name}" if several else "Trials and forecasts"
    return chart(title, lines, x="optimiser step", y="search loss", marks=marks, y_range=(low - room, high + room))


def _trial_text(trial: Mapping[str, Any], run: Run | None = None) -> str:
    text = f"{run.name}: " if run else ""
    text += f"trial at step {trial['start']}, rate {trial['rate']:.3g}, {trial['steps']} steps, "
    text += {
        "committed": "its steps were kept",
        "finished": "not chosen",
        "stopped": "ended early: it could not win",
        "diverged": "diverged",
    }[trial["status"]]
    if trial["mean"] is not None and trial["std"] is not None:
        text += f"; forecast for step {trial['horizon']}: {trial['mean']:.4g} ± {2 * trial['std']:.2g}"
    return text


def _cost(search: Mapping[str, Any]) -> dict[str, Any]:
    searches = search.get("searches") or []
    return {
        "trials": len(search["trials"]),
        "discarded_steps": search["discarded_steps"],
        "extra_forwards": search["extra_forwards"],
        "search_seconds": search["search_seconds"],
        "reason": searches[-1]["reason"] if searches else "",
    }


def _phases(run: Run) -> dict[str, list[float]]:
    return {name: run.column(name)[1] for name in (*PHASES, "step_s")}


def _step_time(runs: Sequence[Run]) -> list[str]:
    timed = [run for run in runs if run.column("step_s")[1]]
    if not timed:
        return []
    rows = []
    for run in timed:
        phases = _phases(run)
        rows.append(
            [run.name, *(f"{1e3 * median(phases[name]):.3g}" if phases[name] else "" for name in (*PHASES, "step_s"))]
        )
    parts = [table(("run", *(f"{_PHASES[name]}, ms" for name in PHASES), "step, ms"), rows, caption="median step time")]
    for run in timed:
        lines = _split(run)
        totals = sorted(math.fsum(line.y[at] for line in lines) for at in range(len(lines[0].y)))
        title = f"Step time: {run.name}" if len(timed) > 1 else "Step time"
        top = 1.1 * totals[int(0.98 * (len(totals) - 1))]
        parts.append(chart(title, lines, x="optimiser step", y="ms a step", y_range=(0.0, top or 1.0)))
    about = (
        "Where a step's time went on rank 0, medians in the table. Exposed communication: the wait for the network when nothing "
        "was left to compute. Steps of a kept trial were taken in the search and are left out."
    )
    return [section("Step time", about, *parts)]


def _split(run: Run) -> list[Line]:
    """The phases in milliseconds at the steps that were timed."""
    rows = [at for at, value in enumerate(run.columns["step_s"]) if math.isfinite(value)]
    steps = [run.columns["step"][at] for at in rows]
    lines = []
    for colour, name in enumerate(PHASES):
        values = run.columns.get(name)
        if values is not None:
            lines.append(
                Line(
                    _PHASES[name],
                    steps,
                    [1e3 * v if math.isfinite(v := values[at]) else 0.0 for at in rows],
                    "area",
                    colour,
                )
            )
    return lines


def _network(runs: Sequence[Run]) -> list[str]:
    parts = []
    ways = (("sent_bytes", "sent"), ("received_bytes", "received"))
    lines = []
    for at, run in enumerate(runs):
        for direction, (name, way) in enumerate(ways):
            steps, values = run.column(name)
            label = f"{run.name}, {way}" if len(runs) > 1 else way
            if values:
                lines.append(Line(label, steps, [value / 2**20 for value in values], colour=2 * at + direction))
    if lines:
        parts.append(chart("Bytes since the start", lines, x="optimiser step", y="MiB"))
    counted = [run for run in runs if run.counters]
    names = list(dict.fromkeys(name for run in counted for name in run.counters or {}))
    if counted:
        rows = [
            [name.replace("_", " "), *(_figure((run.counters or {}).get(name)) for run in counted)] for name in names
        ]
        parts.append(table(("rank 0's counters", *(run.name for run in counted)), rows, caption="counters"))
    for run in runs:
        if run.links:
            most = max(run.links.values()) or 1
            rows = [
                [link, number(load), f"{load / most:.0%}"]
                for link, load in sorted(run.links.items(), key=lambda item: -item[1])
            ]
            parts.append(table((f"link, {run.name}", "bytes", "of the most loaded"), rows, caption="link loads"))
    about = "What rank 0 exchanged, searches included; a link's two directions are counted apart."
    return [section("Network", about, *parts)] if parts else []


def _kernels(runs: Sequence[Run]) -> list[str]:
    rows = [[run.name, *row] for run in runs for row in run.kernels]
    if not rows:
        return []
    shown = table(("run", "call", "path", "why"), rows, caption="kernels", text=True)
    return [section("Kernels", "Which path a call took, and why.", shown)]


def _surroundings(runs: Sequence[Run]) -> str:
    keys = list(dict.fromkeys(key for run in runs for key in run.environment))
    rows = [[key, *(str(run.environment.get(key, "")) for run in runs)] for key in keys]
    options = list(dict.fromkeys(key for run in runs for key in run.settings))
    rows += [[key.replace("_", " "), *(str(run.settings.get(key, "")) for run in runs)] for key in options]
    rows += [["command", *(run.command for run in runs)], ["started", *(run.started for run in runs)]]
    names = [run.name for run in runs]
    parts = [table(("fact", *names), [row for row in rows if len(set(row[1:])) > 1], caption="what differs", text=True)]
    if len(runs) == 1:
        parts = []
    same = [row[:2] for row in rows if len(set(row[1:])) == 1]
    parts.append(table(("fact", "in all runs" if len(runs) > 1 else "value"), same, caption="surroundings", text=True))
    return section("Surroundings", "What the run ran on and what was asked for.", *parts)


def _figure(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
