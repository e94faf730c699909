"""Simulated serving: the scheduler and its rivals over Poisson, bursty or recorded arrivals."""

from trainkit.serving.simulation._goodput import goodput as goodput
from trainkit.serving.simulation._goodput import gpus_needed as gpus_needed
from trainkit.serving.simulation._load import LoadError as LoadError
from trainkit.serving.simulation._load import zipf as zipf
from trainkit.serving.simulation._policies import POLICIES as POLICIES
from trainkit.serving.simulation._result import Result as Result
from trainkit.serving.simulation._simulate import simulate as simulate
