"""`trainkit plan`: what a network can do, what limits it, and the forest that does it."""

import json
import sys
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainkit.cli._picture import check_picture, save_picture
from trainkit.cli._subcommand import Subcommand

if TYPE_CHECKING:
    from trainkit.collectives import Optimum, Topology
    from trainkit.collectives.schedule import Schedule

_COLLECTIVES = ("allreduce", "allgather", "reduce_scatter", "broadcast", "reduce")


_COMPARED = (
    ("halves_in_turn", "one after the other"),
    ("ring", "ring, rank order"),
    ("double_binary_tree", "double binary tree"),
)


@dataclass(frozen=True)
class Options:
    """Options of the plan."""

    topology: Path
    """the network: JSON (name, nodes, compute_nodes, links [[from, to, capacity], ...], optional unit), or what
    nvidia-smi topo -m, rocm-smi --showtopo or ibnetdiscover printed, or Slurm's topology.conf or topology.yaml"""
    machines: int = 1
    """equal machines, each as nvidia-smi topo -m shows one"""
    collective: str = "allreduce"
    """allreduce, allgather, reduce_scatter, broadcast or reduce"""
    trees_per_root: int | None = None
    """trees of each root; default: as many as the optimum needs"""
    root: str | None = None
    """compute node that broadcasts or reduces"""
    max_height: int | None = None
    """most hops between compute nodes in a tree"""
    nbytes: int = 2**30
    """message size that times are printed for"""
    chunks: int = 8
    """pieces that each tree's share is cut into, for --export json"""
    search: bool = False
    """only search: optimum, bottleneck, and what the packing would take"""
    buckets: list[int] | None = None
    """bytes of a model's gradient buckets, as [1048576,26214400]: compare every way to all-reduce them"""
    switch_node: str | None = None
    """node of the network that a SwitchML switch runs at, for --buckets"""
    itemsize: int = 4
    """bytes of one gradient, for --switch-node: 2 for bf16"""
    export: str | None = None
    """json, msccl or mscclpp: write the schedule, to --out or standard output"""
    runtime: str = "msccl"
    """what reads --export msccl: msccl (Microsoft's MSCCL), azure (its executor for NCCL) or rccl"""
    out: Path | None = None
    """file for --export"""
    draw: Path | None = None
    """picture of the trees: .svg, .png or .pdf"""
    html: Path | None = None
    """page of the plan: bottleneck, trees, chunks as they move, times"""
    json: bool = False
    """print the plan as JSON on standard output"""


def run(options: Options) -> int:
    """Print the plan; write what was asked for."""
    from trainkit.collectives.fabrics import read_network

    if options.collective not in _COLLECTIVES:
        raise ValueError(f"--collective must be one of {', '.join(_COLLECTIVES)}, got {options.collective!r}")
    if options.export not in (None, "json", "msccl", "mscclpp"):
        raise ValueError(f"--export must be json, msccl or mscclpp, got {options.export!r}")
    if options.runtime not in ("msccl", "azure", "rccl"):
        raise ValueError(f"--runtime must be msccl, azure or rccl, got {options.runtime!r}")
    check_picture("--draw", options.draw)
    if options.nbytes < 1:
        raise ValueError(f"--nbytes must be at least 1, got {options.nbytes}")
    if options.machines < 1:
        raise ValueError(f"--machines must be at least 1, got {options.machines}")
    topology = read_network(options.topology, machines=options.machines)
    if options.buckets is not None:
        return _compare(topology, options)
    if options.switch_node is not None:
        raise ValueError("--switch-node is for the comparison of --buckets: give the buckets' bytes")
    facts, schedule = _plan(topology, options)
    if options.export:
        facts |= _export(topology, options, schedule)
    if options.json:
        print(json.dumps({key: _plain(value) for key, value in facts.items()}, indent=1))
    elif options.export is None or options.out is not None:
        _print(facts, topology.unit)
    return 0


def _compare(topology: "Topology", options: Options) -> int:
    """Every way to all-reduce the model's buckets, and the one to take."""
    from rich.console import Console

    from trainkit._planner import plan_network

    if options.collective != "allreduce" or options.export is not None:
        raise ValueError("--buckets compares ways to all-reduce: leave --collective and --export out")
    plan = plan_network(topology, options.buckets or [], itemsizes=options.itemsize, switch=options.switch_node)
    if options.json:
        print(json.dumps(plan.as_dict(), indent=1))
    else:
        Console().print(plan.table())
    return 0


def _plan(topology: "Topology", options: Options) -> "tuple[dict[str, Any], Schedule | None]":
    from trainkit.collectives import allreduce_forest, forest, optimum
    from trainkit.collectives.trees import double_binary_tree_time, packing_effort, ring_time

    both = options.collective == "allreduce"
    one: Any = "allgather" if both else options.collective
    best: Optimum = optimum(topology, one, root=options.root)
    laps = 2 if both else 1
    facts: dict[str, Any] = {
        "network": topology.name,
        "collective": options.collective,
        "compute_nodes": len(topology.compute_nodes),
        "inv_rate": best.inv_rate,
        "achievable": best.achievable,
        "bottleneck": _bottleneck(topology, best),
        "time_per_unit": laps * best.achievable / best.shares,
    }
    if options.search:
        # What an all-reduce takes is in its linear program, which has no size before it is solved.
        facts["packing"] = None if both else str(packing_effort(topology, one, root=options.root))
        return facts, None
    made: Any
    if both:
        made = allreduce_forest(topology, trees_per_root=options.trees_per_root, max_height=options.max_height)
        facts["time_per_unit"] = made.time_per_byte
        facts["bound"] = made.bound
        facts["halves_in_turn"] = 2 * best.achievable / best.shares
    else:
        made = forest(
            topology, one, trees_per_root=options.trees_per_root, root=options.root, max_height=options.max_height
        )
        facts["time_per_unit"] = made.inv_rate / best.shares
        facts["trees_per_root"] = made.k
    facts["exact"] = made.exact
    facts["height"] = made.height
    facts["trees"] = len(made.reduce.trees) + len(made.broadcast.trees) if both else len(made.trees)
    if options.collective in ("allreduce", "allgather", "reduce_scatter"):
        facts["ring"] = ring_time(topology, options.collective)
    if both:
        facts["double_binary_tree"] = double_binary_tree_time(topology)
    facts["bandwidth"] = 1 / facts["time_per_unit"]
    if topology.unit is not None:
        facts["seconds"] = made.seconds(options.nbytes)
        facts["nbytes"] = options.nbytes
    if options.draw is not None:
        save_picture(made.draw(_limits(topology, best, options.collective)), options.draw)
        facts["drawn"] = str(options.draw)
    if options.html is not None:
        from trainkit.cli._plan_page import write_plan_page

        write_plan_page(options.html, topology, made, _limits(topology, best, options.collective), facts)
        facts["page"] = str(options.html)
    return facts, made.schedule(options.chunks) if options.export == "json" else None


def _limits(topology: "Topology", best: "Optimum", collective: str) -> set[tuple[str, str]]:
    """The links that leave the bottleneck, or enter it for reductions; both ways for an all-reduce."""
    inside = best.bottleneck
    leaving = {(u, v) for u, v, _ in topology.links if u in inside and v not in inside}
    entering = {(u, v) for u, v, _ in topology.links if v in inside and u not in inside}
    if collective == "allreduce":
        return leaving | entering
    return entering if collective in ("reduce", "reduce_scatter") else leaving


def _bottleneck(topology: "Topology", best: "Optimum") -> list[str]:
    """The smaller side of the cut; which side it is is in its name."""
    rest = [name for name in topology.nodes if name not in best.bottleneck]
    inside = [name for name in topology.nodes if name in best.bottleneck]
    return ["into", *rest] if len(rest) <= len(inside) else ["out of", *inside]


def _export(topology: "Topology", options: Options, schedule: "Schedule | None") -> dict[str, Any]:
    from trainkit.collectives.schedule import to_dict
    from trainkit.collectives.schedule.export import ExportError
    from trainkit.collectives.trees import RUNTIMES, allreduce_forest, fit, forest

    facts: dict[str, Any] = {}
    if schedule is not None:
        schedule.verify()
        text = json.dumps(to_dict(schedule)) + "\n"
    else:
        runtime: Any = options.runtime if options.export == "msccl" else options.export
        one: Any = options.collective
        if options.collective not in ("allreduce", "allgather", "reduce_scatter"):
            raise ExportError(
                f"{runtime} export takes allreduce, allgather and reduce_scatter, not {options.collective}"
            )
        if options.trees_per_root is None:
            fitted = fit(topology, options.collective, runtime)
            text = fitted.text
            facts |= {"export_trees_per_root": fitted.trees_per_root or "optimum", "export_loss": fitted.loss}
            print(
                f"{runtime}: {facts['export_trees_per_root']} trees per root, {float(fitted.loss):.2%} slower than the optimum",
                file=sys.stderr,
            )
        else:
            build = allreduce_forest if one == "allreduce" else lambda t, **more: forest(t, one, **more)
            text = RUNTIMES[runtime](build(topology, trees_per_root=options.trees_per_root).schedule())
    if options.out is None:
        print(text, end="")
        return facts
    partial = options.out.with_name(f".{options.out.name}.partial")
    try:
        partial.write_text(text)
        partial.replace(options.out)
    finally:
        partial.unlink(missing_ok=True)
    return {**facts, "written": str(options.out)}


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Fraction) else value


def _print(facts: dict[str, Any], unit: str | None) -> None:
    print(f"{facts['network']}: {facts['collective']} over {facts['compute_nodes']} compute nodes")
    way, *names = facts["bottleneck"]
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    print(f"  bottleneck          what goes {way} {{{shown}}}")
    print(f"  cut bound           1/x* = {facts['inv_rate']}")
    if facts["achievable"] != facts["inv_rate"]:
        print(f"  achievable          {facts['achievable']} (switches are unbalanced and cannot copy)")
    if "packing" in facts:
        if facts["packing"] is None:
            print(
                "  trees               not known before the all-reduce's linear program is solved: leave --search out"
            )
        else:
            print(f"  packing             {facts['packing']} if the network is irregular, else less; other loads apart")
        return
    rate = facts["bandwidth"]
    print(f"  bandwidth           {float(rate):.6g} {unit or 'of the capacity unit'} (message size over time, {rate})")
    gap = (
        f", at most {float(facts['time_per_unit'] / facts['bound'] - 1):.2%} over the optimum"
        if facts.get("bound")
        else ""
    )
    proof = "proved optimal" if facts["exact"] else f"not proved optimal{gap}"
    print(f"  forest              {facts['trees']} trees, at most {facts['height']} hops, {proof}")
    for key, what in _COMPARED:
        if key in facts:
            print(f"  {what:20}{float(facts[key] / facts['time_per_unit']):.3g} times the forest's time")
    if "seconds" in facts:
        print(f"  {facts['nbytes']} bytes take at least {float(facts['seconds']):.6g} s, latency apart")
    for key in ("written", "drawn", "page"):
        if key in facts:
            print(f"  written             {facts[key]}")


SUBCOMMAND = Subcommand(
    name="plan",
    summary="Find the best collective on a network: its bound, its bottleneck, its trees",
    options=Options,
    run=run,
    example="trainkit plan --topology examples/forest_two_islands.json --export msccl --out forest.xml",
)
