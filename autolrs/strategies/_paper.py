"""The published algorithm (Jin et al., ICLR 2021): scikit-optimize asks, one exponential forecasts, nothing stops early.

The rate with the best value is trained from the state before the search: no trial's steps are committed.
"""

from collections.abc import Sequence

from trainkit.autolrs._forecast import Forecast
from trainkit.autolrs._paper import paper_forecast
from trainkit.autolrs._search import Backend
from trainkit.autolrs.strategies._strategy import Trial


class Paper:
    """One search.

    Args:
        backend: proposes the rates.
        horizon: steps from the search's start to the stage's end.
    """

    keeps = False
    fallback = None
    reason = "its trials are spent"

    def __init__(self, backend: Backend, horizon: int) -> None:
        self._backend, self._horizon = backend, horizon
        self._rates: list[float] = []
        self._forecasts: list[Forecast] = []
        self._worked: list[bool] = []
        self.asked = 0

    def begin(self, loss: float | None) -> None:
        """See `Strategy`."""

    def propose(self) -> float | None:
        """See `Strategy`."""
        self.asked += 1
        return self._backend.ask()

    def observe(self, trial: Trial) -> None:
        """See `Strategy`."""
        steps: Sequence[float] = [float(s) for s in trial.steps]
        self._forecasts.append(paper_forecast(trial.losses, float(self._horizon), steps=steps))
        self._rates.append(trial.rate)
        self._worked.append(not trial.diverged)
        self._backend.tell(trial.rate, self._forecasts[-1].mean, self._forecasts[-1].std)

    def stop(self, trial: Trial) -> bool:
        """See `Strategy`."""
        return False

    def choose(self) -> int | None:
        """See `Strategy`."""
        return self._rates.index(self._backend.best()) if any(self._worked) else None

    def forecast(self, trial: int) -> Forecast:
        """See `Strategy`."""
        return self._forecasts[trial]
