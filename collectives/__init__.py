"""Collectives that follow the network: exact bounds, spanning-tree forests, one form of schedule."""

from trainkit.collectives._topology import Topology as Topology
from trainkit.collectives._topology import TopologyError as TopologyError
from trainkit.collectives.direct import BFB as BFB
from trainkit.collectives.direct import FoundTopology as FoundTopology
from trainkit.collectives.direct import bfb as bfb
from trainkit.collectives.direct import find_topologies as find_topologies
from trainkit.collectives.direct import named_topology as named_topology
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
