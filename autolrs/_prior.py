"""What is known before a run: the constants of the method, each with its meaning and its source."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path


@dataclass(frozen=True)
class Prior:
    """Constants of the Bayesian strategy.

    Rates are log10, so distances are decades; progress and lag are nepers (differences of natural logarithms) of a sum of
    rates.

    Attributes:
        growth: exponent with which the lag grows with the rate. 1: half a decade below the critical rate costs .47 nepers,
            half a decade above it 1.0.
        memory: share of the sum of rates before a search that counts on the run's clock.
        slack: rise of a loss that is within the noise of the measurement, as a share of what the run's loss has fallen.
        spoilt: rise above the best loss that the run has had, as such a share, that shows harm: losses of the weights as they
            are lie above those of averaged ones, which slack does not allow for.
        edge: std by which a trial's harm shows too early or too late, decades.
        further: how far above the critical rate a trial diverges, decades.
        spread: std of what the harm deviates from a straight line, decades.
        length: length scale of that deviation, decades.
        usual_offset: critical rate over the rate that the optimizer's class usually does well with, decades.
        usual_std: its std.
        user_std: std of the critical rate around the rate in the user's optimizer, decades. An assumption: nobody has
            recorded users' rates.
        drift: std by which the critical rate moves while the run becomes e times as long, decades.
        forecast_scale: factor on a forecast's std that makes its 80 % band cover 80 % of what came.
    """

    growth: float
    memory: float
    slack: float
    spoilt: float
    edge: float
    further: float
    spread: float
    length: float
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
