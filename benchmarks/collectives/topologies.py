"""Direct-connect topologies: what the finder finds, what it predicts against usual topologies, and what computing costs.

    python benchmarks/collectives/topologies.py finder      the frontiers and the seconds to reach them
    python benchmarks/collectives/topologies.py predicted   all-reduce of the found against ring, trees, torus, hypercube
    python benchmarks/collectives/topologies.py cost        cost and schedules against linear programs (HiGHS)

Prints Markdown. Seconds are CPU seconds of this process (`time.process_time`).
"""

import argparse
import statistics
import time
from collections.abc import Callable
from fractions import Fraction
from math import log2

import networkx as nx
import numpy as np
from scipy.optimize import linprog

from trainkit.collectives import BFB, bfb, find_topologies, named_topology
from trainkit.collectives._native import direct_evaluate
from trainkit.collectives.direct import Frontier, Progress
from trainkit.collectives.direct._groups import Metacyclic, table

ALPHA, BANDWIDTH = 10e-6, 100e9 / 8
SIZES = {"1 KB": 1e3, "32 KB": 32e3, "1 MB": 1e6, "32 MB": 32e6, "1 GB": 1e9}
# (nodes, two-way only) -> the points to reach, degree 4
TARGETS: dict[tuple[int, bool], list[tuple[int, str]]] = {
    (16, False): [(2, "1"), (3, "15/16")],
    (32, False): [(3, "31/32")],
    (64, False): [(4, "63/64")],
    (128, False): [(4, "127/128")],
    (256, False): [(5, "255/256")],
    (512, False): [(6, "511/512")],
    (1024, False): [(5, "341/256"), (6, "1"), (7, "1023/1024")],
    (1024, True): [(8, "1023/1024")],
}


def cpu(work: Callable[[], object], repeats: int = 5) -> float:
    """Median CPU seconds."""
    spent = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        spent.append(time.process_time() - begin)
    return statistics.median(spent)


def finder(seconds: float, seed: int) -> None:
    """The frontier of every target, and when each point was first reached."""
    print("| N | links | target | reached after (CPU s) | frontier (steps, T_B) | tried | budget, wall / CPU s |")
    print("|---|---|---|---|---|---|---|")
    for (nodes, two_way), points in TARGETS.items():
        reached: dict[tuple[int, str], float] = {}
        begin, begin_wall = time.process_time(), time.monotonic()

        def look(
            progress: Progress,
            points: list[tuple[int, str]] = points,
            reached: dict[tuple[int, str], float] = reached,
            begin: float = begin,
        ) -> None:
            for point in points:
                if any(one.t_l <= point[0] and one.t_b <= Fraction(point[1]) for one in progress.frontier):
                    reached.setdefault(point, time.process_time() - begin)

        budget = seconds if nodes == 1024 else seconds / 8
        frontier = find_topologies(nodes, 4, directed=not two_way, seconds=budget, seed=seed, progress=look)
        used, wall = time.process_time() - begin, time.monotonic() - begin_wall
        when = ", ".join(f"{reached[point]:.1f}" if point in reached else "not reached" for point in points)
        shown = ", ".join(f"({one.t_l}, {one.t_b})" for one in frontier) + (" proven best" if frontier.proven else "")
        wanted = ", ".join(f"({t_l}, {t_b})" for t_l, t_b in points)
        links = "two-way" if two_way else "one-way"
        print(
            f"| {nodes} | {links} | {wanted} | {when} | {shown} | {frontier.tried} | {wall:.0f} / {used:.0f} |",
            flush=True,
        )
        for one in frontier:
            print(f"<!-- {nodes} {links}: {one.name}, transposed T_B {one.t_b_reverse} -->")


def shifted_ring(nodes: int, nbytes: float) -> float:
    """All ports in one-way rings of different strides, the message split over them; N - 1 steps a phase."""
    return 2 * (nodes - 1) * (ALPHA + nbytes / nodes / BANDWIDTH)


def double_binary_tree(nodes: int, nbytes: float) -> float:
    """Two trees, half the message each, four links of B / 4; reduce and broadcast overlap, the best number of chunks."""
    stages = 2 * int(log2(nodes))
    return min((stages + k - 1) * (ALPHA + 2 * nbytes / k / BANDWIDTH) for k in (2**p for p in range(21)))


def near_square(nodes: int) -> str:
    """The torus of two axes."""
    side = 2 ** (int(log2(nodes)) // 2)
    return f"torus({side}, {nodes // side})"


def predicted(seconds: float, seed: int) -> None:
    """Ratios of predicted all-reduce times: a peer's over the found topology's."""
    print(f"alpha {ALPHA * 1e6:g} us, {BANDWIDTH * 8e-9:g} Gbit/s a host, degree 4 (the hypercube: log2 N ports)\n")
    print("| N | size | found, us | shifted ring | double binary tree | torus | hypercube | found topology |")
    print("|---|---|---|---|---|---|---|---|")
    for nodes in (8, 16, 32, 64, 128, 256, 512, 1024):
        frontier: Frontier = find_topologies(nodes, 4, seconds=seconds if nodes == 1024 else seconds / 8, seed=seed)
        torus = named_topology(near_square(nodes))
        # a torus with a side of two has fewer than four ports: the rest of its bandwidth is given to it all the same
        cube = named_topology(f"hypercube({int(log2(nodes))})")
        for label, nbytes in SIZES.items():
            best = frontier.best(nbytes, alpha=ALPHA, bandwidth=BANDWIDTH)
            ours = best.seconds(nbytes, ALPHA, BANDWIDTH)
            peers = [
                shifted_ring(nodes, nbytes),
                double_binary_tree(nodes, nbytes),
                torus.seconds(nbytes, ALPHA, BANDWIDTH),
                cube.seconds(nbytes, ALPHA, BANDWIDTH),
            ]
            ratios = " | ".join(f"{peer / ours:.2f}" for peer in peers)
            print(f"| {nodes} | {label} | {ours * 1e6:.1f} | {ratios} | {best.name} |", flush=True)


def by_linear_program(graph: "nx.MultiDiGraph[int]", receivers: list[int]) -> tuple[list[float], float]:
    """Step -> load of the busiest link by one HiGHS program a receiver and step, and the CPU seconds of the solver."""
    distance = {u: nx.single_source_shortest_path_length(graph.reverse(copy=False), u) for u in graph}
    worst: dict[int, float] = {}
    spent = 0.0
    for u in receivers:
        senders = [w for w in set(graph.predecessors(u)) if w != u]
        width = [graph.number_of_edges(w, u) for w in senders]
        for t in sorted(set(distance[u].values()) - {0}):
            layer = [v for v in graph if distance[u][v] == t]
            usable = [(i, j) for i, v in enumerate(layer) for j, w in enumerate(senders) if distance[w][v] == t - 1]
            whole, room = np.zeros((len(layer), len(usable) + 1)), np.zeros((len(senders), len(usable) + 1))
            for column, (i, j) in enumerate(usable):
                whole[i, column] = room[j, column] = 1
            room[:, -1] = [-w for w in width]
            cost = np.eye(1, len(usable) + 1, len(usable))[0]
            begin = time.process_time()
            found = linprog(cost, room, np.zeros(len(senders)), whole, np.ones(len(layer)), method="highs")
            spent += time.process_time() - begin
            worst[t] = max(worst.get(t, 0.0), found.fun)
    return [worst[t] for t in sorted(worst)], spent


def against_linear_program(name: str, hosts: int) -> None:
    """One row: exact cost of all hosts against HiGHS on `hosts` of them, scaled up."""
    graph = named_topology(name).graph
    ours = cpu(lambda: bfb(graph))
    loads, spent = by_linear_program(graph, list(graph)[:hosts])
    exact = [float(load) for load in bfb(graph).steps]
    if hosts == len(graph):
        assert np.allclose(loads, exact), (loads, exact)
    scaled = spent * len(graph) / hosts
    print(
        f"| {name} | {ours * 1e3:.1f} ms, both directions | {scaled:.2f} s ({hosts} hosts solved) | {scaled / ours:.0f} |"
    )


def cost(_seconds: float, seed: int) -> None:
    """CPU seconds of cost and schedules."""
    print("| work | CPU time |\n|---|---|")
    right = table(Metacyclic(64, 16, 43))
    candidate = cpu(lambda: [direct_evaluate(right, [806, 372, 475, 133], 12) for _ in range(1000)]) / 1000
    print(f"| a Cayley candidate, N = 1024, d = 4, exact, one direction | {candidate * 1e6:.1f} us |")
    cayley = named_topology("cayley(metacyclic(64, 16, 43), 806, 372, 475, 133)").bfb.digraph
    alone = cpu(lambda: bfb(cayley, vertex_transitive=True), 51)
    print(f"| the same as a graph, both directions, `bfb(vertex_transitive=True)` | {alone * 1e3:.2f} ms |")
    for degree in (4, 8, 12):
        graph = nx.MultiDiGraph(nx.random_regular_graph(degree, 1024, seed=seed).to_directed())
        print(f"| any graph, N = 1024, random regular, d = {degree}, exact | {cpu(lambda g=graph: bfb(g), 3):.3f} s |")
    kautz = named_topology("kautz(4, 1000)").graph
    print(f"| any graph, kautz(4, 1000), both directions | {cpu(lambda: bfb(kautz), 3):.3f} s |")
    for name in ("torus(16, 16)", "kautz(4, 1024)", "line(circulant(16, 3, 4), 3)", "hypercube(6)"):
        whole: BFB = named_topology(name).bfb
        moved, portable = cpu(whole.transfers, 3), cpu(whole.schedule, 3)
        chunks = whole.chunking().chunks
        print(
            f"| schedule of {name} as an array; as a `Schedule` ({chunks} chunks) | {moved:.3f} s; {portable:.2f} s |",
            flush=True,
        )
    print("\n| exact cost of | ours | HiGHS, one program a host and step | ratio |\n|---|---|---|---|")
    for name, hosts in (("kautz(4, 64)", 64), ("torus(8, 8)", 64), ("kautz(4, 256)", 16), ("torus(16, 16)", 16)):
        against_linear_program(name, hosts)
    graph = named_topology("cayley(metacyclic(64, 16, 43), 806, 372, 475, 133)").graph
    spent = by_linear_program(graph, [0])[1]
    ratio = spent / candidate
    print(
        f"\nA finder's candidate, N = 1024: {candidate * 1e6:.1f} us, {spent * 1e3:.0f} ms by HiGHS: {ratio:.0f} times."
    )


def main() -> None:
    """Run one part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["finder", "predicted", "cost"])
    parser.add_argument("--seconds", type=float, default=120, help="budget at 1024 hosts; an eighth below")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    {"finder": finder, "predicted": predicted, "cost": cost}[options.part](options.seconds, options.seed)


if __name__ == "__main__":
    main()
