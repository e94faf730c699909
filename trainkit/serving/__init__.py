"""Serving under a latency objective with as few GPUs as the load needs (Symphony, arXiv 2308.07470)."""

from trainkit.serving import bounds as bounds
from trainkit.serving.scheduler import Action as Action
from trainkit.serving.scheduler import Dispatch as Dispatch
from trainkit.serving.scheduler import Drop as Drop
from trainkit.serving.scheduler import Profile as Profile
from trainkit.serving.scheduler import ProfileError as ProfileError
from trainkit.serving.scheduler import Scheduler as Scheduler
from trainkit.serving.scheduler import SchedulerError as SchedulerError
from trainkit.serving.simulation import LoadError as LoadError
from trainkit.serving.simulation import Result as Result
from trainkit.serving.simulation import goodput as goodput
from trainkit.serving.simulation import gpus_needed as gpus_needed
from trainkit.serving.simulation import simulate as simulate
from trainkit.serving.simulation import zipf as zipf
