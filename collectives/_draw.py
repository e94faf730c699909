"""Pictures of networks; where a vertex is drawn, for all pictures of one network."""

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trainkit.collectives._topology import Topology

_LABELLED = 40  # more names than these would cover each other
_WIDTHS = 6  # capacities in the legend

Places = dict[str, tuple[float, float]]


def places(topology: "Topology") -> Places:
    """Compute nodes on a circle in rank order, switches inside at the mean of their neighbours."""
    size = len(topology.compute_nodes)
    angle = {name: 2 * math.pi * rank / size for rank, name in enumerate(topology.compute_nodes)}
    found = {name: (math.sin(a), math.cos(a)) for name, a in angle.items()}
    near: dict[str, list[str]] = {name: [] for name in topology.switches}
    for u, v, _ in topology.links:
        if u in near:
            near[u].append(v)
    for turn, name in enumerate(topology.switches):
        around = [found[other] for other in near[name] if other in found] or [(0.0, 0.0)]
        x, y = (sum(place[axis] for place in around) / len(around) for axis in (0, 1))
        # A little apart, since several switches may see the same neighbours.
        found[name] = (0.7 * x + 0.08 * math.cos(turn), 0.7 * y + 0.08 * math.sin(turn))
    return found


def draw_nodes(axes: "Axes", topology: "Topology", at: Places) -> None:
    """Compute nodes as circles, switches as squares, with names where there are few."""
    for names, marker, colour in ((topology.compute_nodes, "o", "tab:blue"), (topology.switches, "s", "tab:gray")):
        if names:
            across, up = zip(*(at[name] for name in names), strict=True)
            label = "compute node" if marker == "o" else "switch"
            axes.scatter(across, up, marker=marker, color=colour, s=30, zorder=3, label=label)
    if len(topology.nodes) <= _LABELLED:
        for name, (x, y) in at.items():
            axes.annotate(name, (x, y), xytext=(4, 4), textcoords="offset points", fontsize="x-small")
    axes.set_axis_off()
    axes.set_aspect("equal")


def draw_topology(topology: "Topology") -> "Figure":
    """See `Topology.draw`."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(7, 7), layout="constrained")
    axes = figure.add_subplot()
    at = places(topology)
    most = max(capacity for _, _, capacity in topology.links)

    def width(capacity: object) -> float:
        return 0.3 + 2.5 * float(capacity / most)  # type: ignore[operator]

    for u, v, capacity in topology.links:
        (x, y), (to_x, to_y) = at[u], at[v]
        axes.plot([x, to_x], [y, to_y], color="black", alpha=0.35, linewidth=width(capacity))
    draw_nodes(axes, topology, at)
    kinds, _ = axes.get_legend_handles_labels()
    rates = sorted({capacity for _, _, capacity in topology.links}, reverse=True)
    # The widest, the narrowest, and some between.
    shown = rates if len(rates) <= _WIDTHS else [rates[i * (len(rates) - 1) // (_WIDTHS - 1)] for i in range(_WIDTHS)]
    unit = f" {topology.unit}" if topology.unit else ""
    lines = [Line2D([], [], color="black", alpha=0.35, linewidth=width(r), label=f"{float(r):g}{unit}") for r in shown]
    axes.legend(handles=[*kinds, *lines], loc="lower right", fontsize="small")
    axes.set_title(f"{topology.name}: {len(topology.compute_nodes)} compute nodes, {len(topology.switches)} switches")
    return figure
