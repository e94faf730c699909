"""Choose how to cable 32 hosts of 4 ports, and look at what the choice costs.

python examples/topology_choose.py
"""

from trainkit.collectives import find_topologies

ALPHA, BANDWIDTH = 10e-6, 100e9 / 8  # 10 us a step, 100 Gbit/s a host

found = find_topologies(32, 4, seconds=20)
print(f"no topology of this size has fewer than {found.least_t_l} steps or T_B below {found.least_t_b}")
for one in found:
    print(f"{one.t_l} steps, T_B {one.t_b}, of the reduce-scatter {one.t_b_reverse}: {one.name}")

for nbytes in (10**4, 10**8):
    best = found.best(nbytes, alpha=ALPHA, bandwidth=BANDWIDTH)
    print(f"all-reduce of {nbytes} bytes: {best.seconds(nbytes, ALPHA, BANDWIDTH) * 1e6:.0f} us on {best.name}")
