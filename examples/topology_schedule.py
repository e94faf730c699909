"""From one's own graph to a verified all-reduce schedule and a cabling list.

python examples/topology_schedule.py
"""

import networkx as nx

from trainkit.collectives import bfb, named_topology

# Any directed graph will do; here two rings of four hosts, joined by four two-way links.
ring = nx.DiGraph((f"{side}{at}", f"{side}{(at + 1) % 4}") for side in "ab" for at in range(4))
ring.add_edges_from(pair for at in range(4) for pair in ((f"a{at}", f"b{at}"), (f"b{at}", f"a{at}")))
cost = bfb(ring)
print(f"all-gather: {cost.t_l} steps, T_B {cost.t_b}; reduce-scatter: {cost.t_l_reverse} steps, T_B {cost.t_b_reverse}")

schedule = cost.schedule("allreduce", bandwidth=100, unit="Gbit/s")
schedule.verify()
print(f"{len(schedule.ops)} ops, {float(schedule.time(10**6, alpha=1e-5)) * 1e6:.1f} us for a megabyte")

better = named_topology("diamond()")
print(f"eight hosts of two ports can do it in {better.t_l} steps, T_B {better.t_b}; cables:")
print("\n".join(better.cabling_csv().splitlines()[:4]))
