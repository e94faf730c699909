"""Learning rates found while training: loss forecasts, a Bayesian search over log rate, a tuner for plain loops."""

from trainkit.autolrs._forecast import Forecast as Forecast
from trainkit.autolrs._forecast import forecast as forecast
from trainkit.autolrs._history import History as History
from trainkit.autolrs._options import Options as Options
from trainkit.autolrs._schedule import LRSchedule as LRSchedule
from trainkit.autolrs._search import LRSearch as LRSearch
from trainkit.autolrs._tuner import Kept as Kept
from trainkit.autolrs._tuner import Tuner as Tuner
