"""Trees: bounds, forests, the native all-reduce."""

from trainkit.collectives.trees._allreduce import AllreduceForest as AllreduceForest
from trainkit.collectives.trees._allreduce import allreduce_forest as allreduce_forest
from trainkit.collectives.trees._classic import double_binary_tree_time as double_binary_tree_time
from trainkit.collectives.trees._classic import ring_schedule as ring_schedule
from trainkit.collectives.trees._classic import ring_time as ring_time
from trainkit.collectives.trees._fit import RUNTIMES as RUNTIMES
from trainkit.collectives.trees._fit import Fit as Fit
from trainkit.collectives.trees._fit import fit as fit
from trainkit.collectives.trees._flat import ForestError as ForestError
from trainkit.collectives.trees._forest import Forest as Forest
from trainkit.collectives.trees._forest import Tree as Tree
from trainkit.collectives.trees._forest import forest as forest
from trainkit.collectives.trees._optimum import Optimum as Optimum
from trainkit.collectives.trees._optimum import optimum as optimum
from trainkit.collectives.trees._pack import Effort as Effort
from trainkit.collectives.trees._pack import packing_effort as packing_effort
