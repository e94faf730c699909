"""How a search proposes, stops and chooses: one strategy a file, chosen once in the plan."""

from trainkit.autolrs.strategies._bayesian import Bayesian as Bayesian
from trainkit.autolrs.strategies._forecasting import Forecasting as Forecasting
from trainkit.autolrs.strategies._paper import Paper as Paper
from trainkit.autolrs.strategies._strategy import Situation as Situation
from trainkit.autolrs.strategies._strategy import Strategy as Strategy
from trainkit.autolrs.strategies._strategy import Trial as Trial
from trainkit.autolrs.strategies._strategy import worked as worked
