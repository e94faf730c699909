"""Rank order against OR-tools: rings, proofs, halving-doubling, trees, on the tests' datacenter matrices.

    python benchmarks/collectives/order/run.py --peer /path/to/venv-with-ortools/bin/python

Both get the same matrix and the same wall time, one after the other; costs are compared with the same lower bound.
Without --peer the peer's columns are left out.
"""

import argparse
import io
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tests" / "support"))
from order_matrices import Costs, datacenter

from trainkit.collectives._native import order_ring, order_ring_bound
from trainkit.collectives.order import Ordering, order_cost, order_ranks
from trainkit.collectives.order._seed import clustered


def timed(run: Callable[[], Any]) -> tuple[Any, float, float]:
    """Result, wall and CPU seconds."""
    wall, cpu = time.monotonic(), time.process_time()
    return run(), time.monotonic() - wall, time.process_time() - cpu


def peer_order(python: str, cost: Costs, seconds: float) -> tuple[list[int], float]:
    """OR-tools' order and its CPU seconds."""
    data = io.BytesIO()
    np.save(data, cost)
    done = subprocess.run(
        [python, str(Path(__file__).with_name("peer.py")), str(seconds)],
        input=data.getvalue(),
        capture_output=True,
        check=True,
    )
    said = json.loads(done.stdout)
    return said["order"], said["cpu"]


def nearest_bound(cost: Costs) -> float:
    """The bound of each host alone on halving-doubling: its nearest partner takes the largest exchange, and so on."""
    steps = len(cost).bit_length() - 1
    nearest = np.sort(np.minimum(cost, cost.T) + np.diag(np.full(len(cost), np.inf)), axis=1)[:, :steps]
    return float((nearest * 2.0 ** -(np.arange(steps) + 1)).sum(axis=1).max())


def rings(peer: str | None) -> None:
    """The search, its bound, the peer."""
    print(
        "| hosts | seconds | ours / bound | CPU s | bound: wall s | CPU s | OR-tools / bound | CPU s | ours / OR-tools |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for hosts, seconds in ((64, 1.0), (128, 1.0), (256, 1.0), (512, 2.5), (1024, 10.0)):
        cost, _ = datacenter(hosts)
        start = clustered(cost)
        (order, _, _), _, cpu = timed(lambda c=cost, s=start, t=seconds: order_ring(c, s, 0, 10**9, 10**9, t))
        ours = order_cost(cost, order)
        bound, wall, bound_cpu = timed(lambda c=cost, u=ours: order_ring_bound(c, u, 1500, 5.0))
        row = [hosts, seconds, f"{ours / bound:.4f}", f"{cpu:.2f}", f"{wall:.2f}", f"{bound_cpu:.2f}"]
        if peer:
            other, peer_cpu = peer_order(peer, cost, seconds)
            theirs = order_cost(cost, other)
            row += [f"{theirs / bound:.4f}", f"{peer_cpu:.2f}", f"{ours / theirs:.4f}"]
        print("|", " | ".join(map(str, row)), "|", flush=True)


def proofs() -> None:
    """Up to 32 hosts."""
    print("| hosts | seed | cost | bound | proved | wall s | CPU s |\n|---|---|---|---|---|---|---|")
    for hosts in (8, 16, 24, 32):
        for seed in range(4):
            cost, _ = datacenter(hosts, rack=4 if hosts < 24 else 8, seed=seed)
            found, wall, cpu = timed(lambda c=cost: order_ranks(c, seconds=1, least_gain=0))
            facts = [
                hosts,
                seed,
                f"{found.cost:.3f}",
                f"{found.lower_bound:.3f}",
                found.optimal,
                f"{wall:.2f}",
                f"{cpu:.2f}",
            ]
            print("|", " | ".join(map(str, facts)), "|", flush=True)


def others() -> None:
    """Halving-doubling, BCube, trees, bottleneck rings."""
    print(
        "| collective | hosts | given / ours | ours / bound | ours / nearest-partner bound | ended by itself | CPU s |"
    )
    print("|---|---|---|---|---|---|---|")
    runs: list[tuple[Any, Any, int]] = [("halving_doubling", "sum", hosts) for hosts in (64, 128, 256, 512)]
    runs += [(name, "sum", hosts) for name in ("bcube", "double_binary_tree") for hosts in (64, 512)]
    runs += [("ring", "bottleneck", hosts) for hosts in (32, 64, 512)]
    for algorithm, objective, hosts in runs:
        cost, _ = datacenter(hosts)
        found: Ordering
        found, _, cpu = timed(
            lambda c=cost, a=algorithm, o=objective: order_ranks(
                c, a, objective=o, seconds=10, base=4 if a == "bcube" else 2
            )
        )
        near = f"{found.cost / nearest_bound(cost):.3f}" if algorithm == "halving_doubling" else ""
        name = (
            f"{algorithm}, base 4"
            if algorithm == "bcube"
            else f"{algorithm}, {objective}"
            if algorithm == "ring"
            else algorithm
        )
        row = [name, hosts, f"{found.gain:.2f}", f"{found.gap + 1:.3f}", near, found.converged, f"{cpu:.1f}"]
        print("|", " | ".join(map(str, row)), "|", flush=True)


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="python of an environment with OR-tools")
    options = parser.parse_args()
    for title, table in (("Rings", lambda: rings(options.peer)), ("Proofs", proofs), ("Other collectives", others)):
        print(f"\n## {title}\n")
        table()


if __name__ == "__main__":
    main()
