"""The network between the hosts of a job, measured.

Round trips and bandwidth of all pairs in rounds of disjoint pairs, all hosts busy, so that shared uplinks show; from
that a tree of hosts, racks and a core with the capacity of every link.
"""

from trainkit.collectives._probe._meet import placements as placements
from trainkit.collectives._probe._meet import probe as probe
from trainkit.collectives._probe._meet import probe_hosts as probe_hosts
from trainkit.collectives._probe._prior import Prior as Prior
from trainkit.collectives._probe._prior import PriorError as PriorError
from trainkit.collectives._probe._prior import read_prior as read_prior
from trainkit.collectives._probe._result import placed as placed
from trainkit.collectives._probe._rounds import Plan as Plan
from trainkit.collectives._probe._wire import ProbeError as ProbeError
