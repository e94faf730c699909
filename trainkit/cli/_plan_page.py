"""`trainkit plan --html`: what the page shows, read from the plan."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trainkit.collectives import Forest, Topology

_CHUNKS = 2
"""The fewest that show a pipeline."""
_COMPARED = ("ring", "double_binary_tree")
_SIZES = tuple(4**power for power in range(5, 16))
"""1 KiB to 1 GiB."""


def write_plan_page(
    path: Path, topology: "Topology", made: Any, bottleneck: Collection[tuple[str, str]], facts: Mapping[str, Any]
) -> None:
    """Write the page.

    Args:
        path: of the HTML file.
        topology: the network.
        made: the plan's Forest or AllreduceForest.
        bottleneck: the links of the bottleneck cut.
        facts: what the plan says.
    """
    from trainkit._files import write_text_atomically
    from trainkit.collectives._draw import places
    from trainkit.report import network_page

    forests = [made.reduce, made.broadcast] if facts["collective"] == "allreduce" else [made]
    trees = [tree for forest in forests for tree in _trees(forest)]
    names = topology.compute_nodes
    waves: dict[int, list[tuple[str, Sequence[str]]]] = {}
    for op in made.schedule(_CHUNKS).ops:
        if op.kind != "copy":
            verb = "adds to" if op.kind == "reduce" else "sends to"
            text = f"{names[op.src]} {verb} {names[op.dst]}: {_share(op.start)} to {_share(op.stop)} of the message"
            waves.setdefault(op.step, []).append((text, op.path))
    unit = topology.unit or "of its unit"
    ring = {
        key: f"{float(facts[key] / facts['time_per_unit']):.3g} times this plan's time"
        for key in _COMPARED
        if key in facts
    }
    bandwidth = f"{float(facts['bandwidth']):.6g} {unit} (message over time, exactly {facts['bandwidth']})"
    bound = "yes" if made.exact else "no"
    told = {key: str(facts[key]) for key in ("network", "collective", "compute_nodes", "trees", "height")}
    cut = " ".join(facts["bottleneck"][:20])
    rows = {**told, "bandwidth": bandwidth, "proved optimal": bound, "bottleneck": f"what goes {cut}", **ring}
    page = network_page(
        f"{topology.name}: {facts['collective']}",
        [(key.replace("_", " "), value) for key, value in rows.items()],
        places(topology),
        topology.switches,
        {(u, v): f"{float(capacity):.6g} {unit}" for u, v, capacity in topology.links},
        bottleneck,
        trees,
        [waves[step] for step in sorted(waves)],
        _times(topology) if facts["collective"] == "allreduce" and topology.unit is not None else {},
    )
    write_text_atomically(path, page)


def _trees(forest: "Forest") -> Iterator[tuple[str, str, Sequence[Sequence[str]]]]:
    way = "to" if forest.reducing else "from"
    for number, (tree, share) in enumerate(zip(forest.trees, forest.shares(), strict=True), 1):
        yield f"{number}: {way} {tree.root}, {float(share):.2%} of the message", tree.root, tree.paths


def _share(value: Fraction) -> str:
    return str(value) if value.denominator < 1000 else f"{float(value):.4f}"


def _times(topology: "Topology") -> dict[str, tuple[Sequence[float], Sequence[float]]]:
    from trainkit._planner import plan_network

    plan = plan_network(topology, _SIZES)
    return {one.name: (_SIZES, one.seconds) for one in plan.algorithms}
