"""Schedules that run: compiled for each rank, chunk after chunk, both directions at once."""

from trainkit.collectives._exchange import Placement as Placement
from trainkit.collectives.execute._backend import BACKEND as BACKEND
from trainkit.collectives.execute._backend import register_backend as register_backend
from trainkit.collectives.execute._ddp import ddp_of as ddp_of
from trainkit.collectives.execute._errors import CollectiveTimeout as CollectiveTimeout
from trainkit.collectives.execute._errors import ExecutionError as ExecutionError
from trainkit.collectives.execute._errors import PeerLost as PeerLost
from trainkit.collectives.execute._mesh import UNSENT as UNSENT
from trainkit.collectives.execute._nccl import waves_of as waves_of
from trainkit.collectives.execute._options import ForestOptions as ForestOptions
from trainkit.collectives.execute._reference import run_reference as run_reference
from trainkit.collectives.execute._runner import Runner as Runner
from trainkit.collectives.execute._state import ForestState as ForestState
from trainkit.collectives.execute._state import forest_hook as forest_hook
