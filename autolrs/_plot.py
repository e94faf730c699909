"""The run as a picture: rates above, trials and their forecasts below."""

import math
from typing import TYPE_CHECKING

from trainkit.autolrs._history import History
from trainkit.autolrs._schedule import LRSchedule

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLOURS = {"committed": "tab:green", "finished": "tab:blue", "stopped": "tab:gray", "diverged": "tab:red"}


def plot(history: History, schedule: LRSchedule) -> "Figure":
    """Draws the learning-rate staircase with every trial, and the trials' losses with their 80 % forecast bands.

    Args:
        history: record of a run.
        schedule: its schedule.

    Returns:
        A new matplotlib Figure; nothing is shown or saved.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    above.plot(range(len(schedule)), schedule.rates, color="black", label="committed")
    for trial in history.trials:
        colour, end = _COLOURS[trial.status], trial.start + trial.steps
        above.plot([trial.start, end], [trial.rate] * 2, color=colour, linewidth=2, alpha=0.7)
        below.plot(trial.loss_steps, [v if math.isfinite(v) else math.nan for v in trial.losses], color=colour)
        if math.isfinite(trial.mean) and math.isfinite(trial.std):
            below.errorbar(trial.horizon, trial.mean, yerr=1.2816 * trial.std, color=colour, marker="o", capsize=3)
    above.set(yscale="log", ylabel="learning rate")
    below.set(xlabel="committed step", ylabel="search loss")
    for status, colour in _COLOURS.items():
        below.plot([], [], color=colour, label=status)
    below.legend(ncols=4, fontsize="small")
    return figure
