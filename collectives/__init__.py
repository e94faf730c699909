"""Collectives that follow the network: exact bounds, spanning-tree forests, one form of schedule.

What runs schedules needs torch and is imported on first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from trainkit.collectives._probe import ProbeError as ProbeError
from trainkit.collectives._probe import probe as probe
from trainkit.collectives._topology import Topology as Topology
from trainkit.collectives._topology import TopologyError as TopologyError
from trainkit.collectives.direct import BFB as BFB
from trainkit.collectives.direct import FoundTopology as FoundTopology
from trainkit.collectives.direct import bfb as bfb
from trainkit.collectives.direct import find_topologies as find_topologies
from trainkit.collectives.direct import named_topology as named_topology
from trainkit.collectives.order import Ordering as Ordering
from trainkit.collectives.order import order_ranks as order_ranks
from trainkit.collectives.schedule import Op as Op
from trainkit.collectives.schedule import Schedule as Schedule
from trainkit.collectives.schedule import ScheduleError as ScheduleError
from trainkit.collectives.trees import AllreduceForest as AllreduceForest
from trainkit.collectives.trees import Forest as Forest
from trainkit.collectives.trees import ForestError as ForestError
from trainkit.collectives.trees import Optimum as Optimum
from trainkit.collectives.trees import Tree as Tree
from trainkit.collectives.trees import allreduce_forest as allreduce_forest
from trainkit.collectives.trees import forest as forest
from trainkit.collectives.trees import optimum as optimum
from trainkit.collectives.trees import ring_schedule as ring_schedule

if TYPE_CHECKING:
    from trainkit.collectives.execute import ExecutionError as ExecutionError
    from trainkit.collectives.execute import ForestOptions as ForestOptions
    from trainkit.collectives.execute import ForestState as ForestState
    from trainkit.collectives.execute import PeerLost as PeerLost
    from trainkit.collectives.execute import Runner as Runner
    from trainkit.collectives.execute import forest_hook as forest_hook
    from trainkit.collectives.execute import register_backend as register_backend

_EXECUTE = ("ExecutionError", "ForestOptions", "ForestState", "PeerLost", "Runner", "forest_hook", "register_backend")


def __getattr__(name: str) -> object:
    if name not in _EXECUTE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("trainkit.collectives.execute"), name)
