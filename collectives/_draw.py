"""Pictures of networks and forests."""

import math
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trainkit.collectives._topology import Topology
    from trainkit.collectives.trees import Forest

_PANELS = 12
_LABELLED = 40  # more names than these would cover each other


def _places(topology: "Topology") -> dict[str, tuple[float, float]]:
    """Compute nodes on a circle in rank order, switches inside at the mean of their neighbours."""
    size = len(topology.compute_nodes)
    angle = {name: 2 * math.pi * rank / size for rank, name in enumerate(topology.compute_nodes)}
    places = {name: (math.sin(a), math.cos(a)) for name, a in angle.items()}
    near: dict[str, list[str]] = {name: [] for name in topology.switches}
    for u, v, _ in topology.links:
        if u in near:
            near[u].append(v)
    for turn, name in enumerate(topology.switches):
        around = [places[other] for other in near[name] if other in places] or [(0.0, 0.0)]
        x, y = (sum(place[axis] for place in around) / len(around) for axis in (0, 1))
        # A little apart, since several switches may see the same neighbours.
        places[name] = (0.7 * x + 0.08 * math.cos(turn), 0.7 * y + 0.08 * math.sin(turn))
    return places


def _nodes(axes: "Axes", topology: "Topology", places: dict[str, tuple[float, float]]) -> None:
    for names, marker, colour in ((topology.compute_nodes, "o", "tab:blue"), (topology.switches, "s", "tab:gray")):
        if names:
            across, up = zip(*(places[name] for name in names), strict=True)
            axes.scatter(across, up, marker=marker, color=colour, s=30, zorder=3)
    if len(topology.nodes) <= _LABELLED:
        for name, (x, y) in places.items():
            axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    axes.set_axis_off()
    axes.set_aspect("equal")


def draw_topology(topology: "Topology") -> "Figure":
    """See `Topology.draw`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.add_subplot()
    places = _places(topology)
    most = max(capacity for _, _, capacity in topology.links)
    for u, v, capacity in topology.links:
        (x, y), (to_x, to_y) = places[u], places[v]
        axes.plot([x, to_x], [y, to_y], color="black", alpha=0.35, linewidth=0.3 + 2.5 * float(capacity / most))
    _nodes(axes, topology, places)
    axes.set_title(f"{topology.name}: {len(topology.compute_nodes)} compute nodes, {len(topology.switches)} switches")
    return figure


def draw_forest(forest: "Forest") -> "Figure":
    """See `Forest.draw`."""
    from matplotlib.figure import Figure

    count = min(_PANELS, len(forest.trees))
    columns = min(4, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(4 * columns, 4 * rows), layout="constrained")
    places = _places(forest.topology)
    shades = ["tab:red", "tab:orange", "tab:green", "tab:cyan", "tab:purple", "tab:pink"]
    for panel in range(count):
        axes = figure.add_subplot(rows, columns, panel + 1)
        tree = forest.trees[panel]
        start = int(forest.flat.edge_start[panel])
        depths = forest.flat.depth[start : start + len(tree.edges)].tolist()
        for path, depth in zip(tree.paths, depths[::-1] if forest.reducing else depths, strict=True):
            for u, v in pairwise(path):
                axes.annotate(
                    "",
                    places[v],
                    places[u],
                    arrowprops={"arrowstyle": "->", "color": shades[(depth - 1) % len(shades)], "lw": 1.0},
                )
        _nodes(axes, forest.topology, places)
        axes.set_title(f"root {tree.root}, {tree.multiplicity} of {forest.k}", fontsize="small")
    more = len(forest.trees) - count
    figure.suptitle(f"{forest.topology.name}: {forest.collective}" + (f" ({more} more trees)" if more else ""))
    return figure
