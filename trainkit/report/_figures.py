"""The demo's figures, from the rows and the search history that its run left."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, float]]

_COLOURS = {"autolrs": "#0b6fa4", "default": "#9aa5b1", "constant": "#d9822b"}
_TRIAL_COLOURS = {"committed": "#0b6fa4", "finished": "#7fb2cf", "stopped": "#b9c4cf", "diverged": "#c23b3b"}
_NATS_TO_BITS = 1 / math.log(2)


def _axes(rows: int = 1, height: float = 3.4) -> tuple[Figure, list[Axes]]:
    drawing = Figure(figsize=(10, height * rows), layout="constrained")
    axes = [drawing.add_subplot(rows, 1, row + 1) for row in range(rows)]
    for ax in axes:
        ax.grid(color="#e6eaef", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    return drawing, axes


def _column(rows: Rows, name: str) -> tuple[list[float], list[float]]:
    pairs = [(row["step"], row[name]) for row in rows if not math.isnan(row[name])]
    return [step for step, _ in pairs], [value for _, value in pairs]


def losses(arms: Mapping[str, tuple[str, Rows]]) -> Figure:
    """Training loss (thin) and validation loss (dots) of each arm, bits a byte, over kept steps."""
    drawing, (ax,) = _axes(height=4)
    for arm, (label, rows) in arms.items():
        ax.plot(*_column(rows, "train_bits"), color=_COLOURS[arm], linewidth=0.8, alpha=0.5)
        ax.plot(*_column(rows, "val_bits"), color=_COLOURS[arm], marker="o", markersize=4, linewidth=1.6, label=label)
    ax.set(xlabel="kept optimiser step", ylabel="bits a byte")
    ax.legend(frameon=False)
    return drawing


def staircase(rows: Rows, history: Mapping[str, Any]) -> Figure:
    """Above: the rate of every kept step and, as dots, every rate that was tried. Below: the trials' losses and the
    forecast of each with a band of two standard deviations.
    """
    drawing, (above, below) = _axes(rows=2)
    above.plot(*_column(rows, "rate"), color=_COLOURS["autolrs"], drawstyle="steps-post", linewidth=1.8)
    above.set(yscale="log", ylabel="learning rate")
    below.set(xlabel="kept optimiser step", ylabel="search loss, bits a byte")
    shown = set()
    for number, trial in enumerate(history["trials"]):
        status, colour = trial["status"], _TRIAL_COLOURS[trial["status"]]
        above.scatter(
            trial["start"], trial["rate"], s=22, color=colour, zorder=3, label=None if status in shown else status
        )
        shown.add(status)
        measured = [
            (s, v * _NATS_TO_BITS) for s, v in zip(trial["loss_steps"], trial["losses"], strict=True) if v is not None
        ]
        if not measured:
            continue
        below.plot(*zip(*measured, strict=True), color=colour, linewidth=1.2)
        if trial["mean"] is None or trial["std"] is None:
            continue
        # forecasts of one search share a horizon: stand them side by side
        mean, band, at = (
            trial["mean"] * _NATS_TO_BITS,
            2 * trial["std"] * _NATS_TO_BITS,
            trial["horizon"] + 0.5 * (number % 8),
        )
        below.plot([measured[-1][0], at], [measured[-1][1], mean], color=colour, linewidth=0.7, linestyle=":")
        below.errorbar(at, mean, yerr=band, color=colour, capsize=2, linewidth=1, marker="o", markersize=3)
    limits = [
        v * _NATS_TO_BITS for t in history["trials"] if t["status"] != "diverged" for v in t["losses"] if v is not None
    ]
    if limits:
        low, high = min(limits), max(limits)
        below.set_ylim(low - 0.3 * (high - low) - 0.1, high + 0.2 * (high - low) + 0.1)
    if shown:
        above.legend(frameon=False, title="trials", loc="upper right")
    return drawing


def network(rows: Rows) -> Figure:
    """Bytes each way and retransmissions of rank 0, since the start of the run."""
    drawing, (above, below) = _axes(rows=2, height=2.6)
    for name, label in (("sent_bytes", "to the switch"), ("received_bytes", "from the switch")):
        steps, values = _column(rows, name)
        above.plot(steps, [value / 2**20 for value in values], label=label)
    above.set(ylabel="MiB")
    above.legend(frameon=False)
    below.plot(*_column(rows, "retransmissions"), color="#c23b3b")
    below.set(xlabel="kept optimiser step", ylabel="retransmissions")
    return drawing


def step_time(rows: Rows) -> Figure:
    """Milliseconds of each step, by phase."""
    drawing, (ax,) = _axes()
    phases = {
        "forward": ("forward_s", "#0b6fa4"),
        "backward": ("backward_s", "#5aa9d6"),
        "waiting for the network": ("network_s", "#d9822b"),
        "optimiser": ("optimizer_s", "#7a6bb0"),
    }
    steps = [row["step"] for row in rows]
    stacks = [[1000 * row[column] for row in rows] for column, _ in phases.values()]
    ax.stackplot(steps, stacks, labels=list(phases), colors=[colour for _, colour in phases.values()])
    totals = sorted(1000 * row["step_s"] for row in rows)
    ax.set_ylim(0, 1.3 * totals[int(0.95 * (len(totals) - 1))])
    ax.set(xlabel="kept optimiser step", ylabel="ms a step")
    ax.legend(frameon=False, ncols=4, loc="upper right")
    return drawing
