"""What generating forests costs, against the authors' code where it is given.

    python benchmarks/collectives/generation.py times                    our seconds, heights and memory
    python benchmarks/collectives/generation.py allreduce                the native all-reduce: seconds and gain
    python benchmarks/collectives/generation.py peer --checkout FOLDER   beside the authors' code (liangyuRain/ForestColl)
    python benchmarks/collectives/generation.py teccl                    beside TE-CCL's published outputs
    python benchmarks/collectives/generation.py exports                  what fits MSCCL and MSCCL++, and the loss

Prints Markdown. Seconds are CPU seconds of this process (`time.process_time`), the median of --repeat runs; one call goes
from the Topology to trees verified on physical links.
"""

import argparse
import contextlib
import io
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from trainkit.collectives import Topology, allreduce_forest, fabrics, forest, optimum
from trainkit.collectives.schedule.export import ExportError
from trainkit.collectives.trees import RUNTIMES, fit

NETWORKS: dict[str, Callable[[], Topology]] = {
    "DGX A100 2x8": lambda: fabrics.dgx_a100(2),
    "DGX A100 4x8": lambda: fabrics.dgx_a100(4),
    "DGX A100 8x8": lambda: fabrics.dgx_a100(8),
    "DGX H100 16x8": lambda: fabrics.dgx_h100(16),
    "DGX H100 32x8": lambda: fabrics.dgx_h100(32),
    "DGX H100 128x8": lambda: fabrics.dgx_h100(128),
    "rail fat-tree 4x32x8, 2:1": lambda: fabrics.rail_fat_tree(4, 32, 8, oversubscription=2),
    "MI250 2x16": lambda: fabrics.mi250(2),
    "torus 8x8": lambda: fabrics.torus([8, 8]),
    "hypercube 6": lambda: fabrics.hypercube(6),
    "DGX H100 16x8, one link slow both ways": lambda: _slowed(fabrics.dgx_h100(16), both=True),
    "DGX H100 128x8, one link slow both ways": lambda: _slowed(fabrics.dgx_h100(128), both=True),
}
# network -> most seconds, most hops
LIMITS = {
    "DGX A100 2x8": (0.02, 5),
    "DGX A100 8x8": (0.3, 4),
    "DGX H100 16x8": (2.0, 4),
    "DGX H100 32x8": (20.0, None),
    "DGX H100 128x8": (300.0, None),
    "rail fat-tree 4x32x8, 2:1": (300.0, None),
}
# What the authors' code is given: (its own builder, machines, trees per root).
PEER = {
    "DGX A100 1x8": ("a100_topology", 1, None),
    "DGX A100 2x8": ("a100_topology", 2, None),
    "DGX A100 2x8, k=1": ("a100_topology", 2, 1),
    "DGX A100 4x8, k=1": ("a100_topology", 4, 1),
    "MI250 1x16": ("mi250_topology", 1, None),
    "MI250 2x16, k=1": ("mi250_topology", 2, 1),
}


# microsoft/TE-CCL, output_provided, all-gather of 1 GB: boxes -> (GB/s, solver seconds) of its variants
TE_CCL = {2: [(22.857, 43.0), (20.0, 4.6)], 4: [(15.385, 221.5), (15.094, 30854.98), (11.429, 7355.9)]}


def _slowed(topology: Topology, both: bool) -> Topology:
    change: dict[tuple[str, str], Any] = {("g3_0", "IB"): 25}
    return topology.with_links(change | ({("IB", "g3_0"): 25} if both else {}))


def clocked(work: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """Median CPU seconds and the last result; long work is not repeated."""
    seconds, result = [], None
    for _ in range(repeat):
        begin = time.process_time()
        result = work()
        seconds.append(time.process_time() - begin)
        if sum(seconds) > 60:
            break
    return statistics.median(seconds), result


def times(options: argparse.Namespace) -> Iterator[str]:
    yield "| network | 1/x* | search s | search, trees, check s | limit s | k | trees | hops | limit |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, make in NETWORKS.items():
        topology = make()
        search, best = clocked(lambda topology=topology: optimum(topology), options.repeat)
        # A fresh Topology each time: nothing is remembered from run to run.
        whole, trees = clocked(lambda topology=topology: forest(Topology.from_dict(topology.to_dict())), options.repeat)
        building, _ = clocked(lambda topology=topology: Topology.from_dict(topology.to_dict()), options.repeat)
        most, hops = LIMITS.get(name, (None, None))
        yield (
            f"| {name} | {best.inv_rate} | {search:.4f} | {whole - building:.4f} | {most or ''} | {trees.k} | "
            f"{len(trees.trees)} | {trees.height} | {hops or ''} |"
        )
    broken = _slowed(fabrics.dgx_h100(128), both=False)
    search, best = clocked(lambda: optimum(broken), options.repeat)
    from trainkit.collectives.trees import packing_effort

    yield ""
    yield (
        f"DGX H100 128x8 with one link slow one way: cut bound {best.inv_rate}, achievable {best.achievable}, searched in "
        f"{search:.2f} s; an exact packing is expected to take {packing_effort(broken)}."
    )
    yield f"Most memory of this process: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB."


def allreduce(options: argparse.Namespace) -> Iterator[str]:
    yield "| network | seconds | limit s | time per byte | one after the other | gain | proved |"
    yield "|---|---|---|---|---|---|---|"
    networks = {
        "DGX A100 2x8": (fabrics.dgx_a100(2), None),
        "DGX A100 8x8": (fabrics.dgx_a100(8), 30),
        "DGX H100 16x8": (fabrics.dgx_h100(16), 120),
        "MI250 2x16": (fabrics.mi250(2), None),
        "star of 8, one slow": (fabrics.star([25] + [100] * 7), None),
        "mesh 3x3": (fabrics.mesh([3, 3]), None),
    }
    for name, (topology, most) in networks.items():
        seconds, both = clocked(lambda topology=topology: allreduce_forest(topology), options.repeat)
        halves = 2 * optimum(topology).achievable / len(topology.compute_nodes)
        yield (
            f"| {name} | {seconds:.3f} | {most or ''} | {both.time_per_byte} | {halves} | "
            f"{float(halves / both.time_per_byte):.3f} | {both.exact} |"
        )


def peer(options: argparse.Namespace) -> Iterator[str]:
    sys.path.insert(0, str(options.checkout))  # before this folder, which has a topologies.py of its own
    import pipeline_allgather  # type: ignore[import-not-found]
    import topologies  # type: ignore[import-not-found]

    yield "| network | theirs s | ours s | factor | their bandwidth | ours | their hops | ours |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, (builder, machines, k) in PEER.items():
        graph, gpus = getattr(topologies, builder)(machines)
        nodes = [str(node) for node in graph.nodes]
        links = [(str(u), str(v), data["capacity"]) for u, v, data in graph.edges(data=True)]
        topology = Topology(name, nodes, [str(gpu) for gpu in gpus], links, unit="GB/s")

        def theirs(graph: Any = graph, gpus: Any = gpus, k: int | None = k) -> Any:
            with contextlib.redirect_stdout(io.StringIO()):
                return pipeline_allgather.optimal_pipeline_spanning_trees(graph, compute_nodes=set(gpus), fixed_K=k)

        slow, ((unit, trees), (paths, _)) = clocked(theirs, 1)
        fast, ours = clocked(lambda topology=topology, k=k: forest(topology, trees_per_root=k), options.repeat)
        hops = max(_height(root, tree) for (root, _), tree in paths.items())
        rates = (float(len(gpus) * trees / unit), float(len(gpus) / ours.inv_rate))
        yield (
            f"| {name} | {slow:.3f} | {fast:.4f} | {slow / fast:.0f} | {rates[0]:.3f} | {rates[1]:.3f} | {hops} | "
            f"{ours.height} |"
        )


def _height(root: Any, tree: Any) -> int:
    """Hops between compute nodes of one of the peer's trees: its edges are lists of physical links."""
    parent = {path[-1][-1]: path[0][0] for path in tree}

    def depth(node: Any) -> int:
        return 0 if node == root else 1 + depth(parent[node])

    return max(depth(node) for node in parent)


def teccl(options: argparse.Namespace) -> Iterator[str]:
    case = next(case for case in json.loads(options.cases.read_text()) if case["name"] == "teccl_ndv2_4x8")
    yield "| network | TE-CCL's outputs, GB/s (solver s) | ours, GB/s | ours, ms |"
    yield "|---|---|---|---|"
    for boxes, published in TE_CCL.items():
        gone = tuple(f"g{box}_" for box in range(boxes, 4))
        nodes = [name for name in case["nodes"] if not name.startswith(gone)]
        compute = [name for name in case["compute_nodes"] if name in nodes]
        links = [link for link in case["links"] if {link[0], link[1]} <= set(nodes)]
        topology = Topology(f"NDv2 {boxes}x8", nodes, compute, links)
        seconds, trees = clocked(lambda topology=topology: forest(topology), options.repeat)
        # The case counts capacity in half GB/s.
        rate = len(compute) / trees.inv_rate / 2
        theirs = ", ".join(f"{value} ({spent})" for value, spent in published)
        yield f"| {topology.name} | {theirs} | {float(rate):.3f} | {1000 * seconds:.1f} |"


def exports(options: argparse.Namespace) -> Iterator[str]:
    columns = [(runtime, collective) for runtime in RUNTIMES for collective in ("allgather", "allreduce")]
    yield "| network | " + " | ".join(f"{runtime} {collective}" for runtime, collective in columns) + " |"
    yield "|---" * (len(columns) + 1) + "|"
    for case in json.loads(Path(options.cases).read_text()):
        if len(case["compute_nodes"]) > 64:
            continue
        topology = Topology.from_dict({key: case[key] for key in ("name", "nodes", "compute_nodes", "links")})
        cells = []
        for runtime, collective in columns:
            try:
                fitted = fit(topology, collective, runtime)  # type: ignore[arg-type]
                k = "optimum" if fitted.trees_per_root is None else f"k={fitted.trees_per_root}"
                cells.append(f"{k}, loss {_percent(fitted.loss)}")
            except ExportError as error:
                cells.append(str(error))
        yield f"| {case['name']} | " + " | ".join(cells) + " |"


def _percent(loss: Fraction) -> str:
    return f"{float(100 * loss):.2f} %"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["times", "allreduce", "peer", "teccl", "exports"])
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--checkout", type=Path, help="clone of the authors' repository")
    parser.add_argument("--cases", type=Path, default=Path("tests/data/forest_cases.json"))
    options = parser.parse_args()
    if options.table == "peer" and options.checkout is None:
        parser.error("peer needs --checkout")
    tables = {"times": times, "allreduce": allreduce, "peer": peer, "teccl": teccl, "exports": exports}
    for line in tables[options.table](options):
        print(line, flush=True)


if __name__ == "__main__":
    main()
