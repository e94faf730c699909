"""Two islands of four ranks with slow uplinks: what limits them, the forest that reaches the bound, the ring beside it.

python examples/forest_plan.py [network.json]
"""

import sys
from pathlib import Path

from trainkit.collectives import Topology, allreduce_forest, optimum, ring_schedule

path = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "forest_two_islands.json"
network = Topology.load(path)
megabyte = 10**6

best = optimum(network)
print(
    f"{network.name}: no all-gather beats M/N * {best.inv_rate}; the bottleneck is what leaves {sorted(best.bottleneck)}"
)

both = allreduce_forest(network)
schedule = both.schedule(chunks=16)
schedule.verify()
ring = ring_schedule(network, "allreduce")
ring.verify()
print(f"all-reduce of 64 MB: at least {float(both.seconds(64 * megabyte)):.2f} s")
for name, candidate in (("forest", schedule), ("ring", ring)):
    print(f"  {name:7} {float(candidate.time(64 * megabyte, alpha=1e-4)):.2f} s with 0.1 ms of latency per hop")
