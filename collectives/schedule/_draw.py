"""A schedule as a picture: ranks over steps."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from trainkit.collectives.schedule._form import Schedule

_COLOURS = {"send": "tab:blue", "reduce": "tab:red", "copy": "tab:gray"}


def draw(schedule: "Schedule") -> "Figure":
    """See `Schedule.draw`."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    size, steps = len(schedule.ranks), max(1, schedule.steps)
    figure = Figure(figsize=(min(16.0, 2 + steps), min(12.0, 1.5 + 0.3 * size)), layout="constrained")
    axes = figure.add_subplot()
    for kind, colour in _COLOURS.items():
        lines = [[(op.step, op.src), (op.step + 0.85, op.dst)] for op in schedule.ops if op.kind == kind]
        axes.add_collection(LineCollection(lines, colors=colour, linewidths=0.8, alpha=0.6))
    axes.set(
        title=f"{schedule.name}: {schedule.collective}, {len(schedule.ops)} ops",
        xlabel="step" if schedule.mode == "steps" else "wave",
        xlim=(-0.2, steps + 0.1),
        ylim=(size - 0.5, -0.5),
        yticks=range(size),
    )
    axes.set_yticklabels(schedule.ranks, fontsize="small")
    used = {op.kind for op in schedule.ops}
    axes.legend([Line2D([], [], color=_COLOURS[kind]) for kind in sorted(used)], sorted(used), loc="upper right")
    return figure
