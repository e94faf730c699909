"""Trees: bounds, forests, the native all-reduce."""

from trainkit.collectives.trees._allreduce import AllreduceForest as AllreduceForest
from trainkit.collectives.trees._allreduce import allreduce_forest as allreduce_forest
from trainkit.collectives.trees._flat import ForestError as ForestError
from trainkit.collectives.trees._forest import Forest as Forest
from trainkit.collectives.trees._forest import Tree as Tree
from trainkit.collectives.trees._forest import forest as forest
from trainkit.collectives.trees._optimum import Optimum as Optimum
from trainkit.collectives.trees._optimum import optimum as optimum
