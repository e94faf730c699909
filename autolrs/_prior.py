"""What is known before a run: the constants of the method, each with its meaning and its source."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Prior:
    """Constants of the Bayesian strategy.

    `growth`, the two weights and the usual rate's offset and std are fitted by `benchmarks/autolrs/prior.py fit` on
    recorded runs; the others were set by hand after looking at the same runs. Rates are log10, so distances are
    decades; progress and lag are nepers (differences of natural logarithms) of a sum of rates.

    Attributes:
        growth: exponent with which a rate's lag grows with the rate.
        first_weight: what a lag seen at the run's start is worth at its end, over what it was in the trial: more than
            1, for a run's first steps reward rates that harm it later.
        later_weight: the same for later searches: less than 1, for a part of it is noise that the anneal takes away.
        memory: share of the sum of rates before a search that counts on its trials' clock.
        misfit: std by which the losses of two trials differ at the same sum of rates, as a share of their fall.
        spread: std of what the lag deviates from its mean function, nepers.
        length: length scale of that deviation, decades.
        noise: least std of a measured lag, nepers.
        relative_noise: std of a measured lag as a share of it.
        divergence: mean lag at which every other trial diverges, nepers.
        usual_offset: critical rate over the rate that the optimizer's class usually does well with, decades.
        usual_std: its std.
        user_std: std of the critical rate around the rate in the user's optimizer, decades. An assumption: nobody has
            recorded users' rates.
        drift: std by which the critical rate moves from the run's start to the second search, decades.
        forecast_scale: factor on a forecast's std that makes its 80 % band cover 80 % of what came.
    """

    growth: float
    first_weight: float
    later_weight: float
    memory: float
    misfit: float
    spread: float
    length: float
    noise: float
    relative_noise: float
    divergence: float
    usual_offset: float
    usual_std: float
    user_std: float
    drift: float
    forecast_scale: float

    @classmethod
    def load(cls, path: Path) -> "Prior":
        """Reads a file that the fit wrote."""
        data = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{name: float(data[name]) for name in cls.__dataclass_fields__})


@cache
def default_prior() -> Prior:
    """The prior fitted on the whole library."""
    return Prior.load(Path(__file__).with_name("prior.json"))
