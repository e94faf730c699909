"""Pictures of forests: one panel per tree, hop by hop, and the links that limit the network."""

import math
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from trainkit.collectives._draw import Places, draw_nodes, places

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from trainkit.collectives.trees._allreduce import AllreduceForest
    from trainkit.collectives.trees._forest import Forest

_PANELS = 12
_SHADES = ("tab:red", "tab:orange", "tab:green", "tab:cyan", "tab:purple", "tab:pink")
_LIMIT = "gold"

Link = tuple[str, str]


def draw_forest(forest: "Forest", bottleneck: Collection[Link] = ()) -> "Figure":
    """See `Forest.draw`."""
    return _draw(forest.topology.name, [forest], bottleneck, _PANELS)


def draw_allreduce(both: "AllreduceForest", bottleneck: Collection[Link] = ()) -> "Figure":
    """See `AllreduceForest.draw`."""
    return _draw(both.topology.name, [both.reduce, both.broadcast], bottleneck, _PANELS // 2)


def _draw(name: str, forests: "Sequence[Forest]", bottleneck: Collection[Link], most: int) -> "Figure":
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    counts = [min(most, len(forest.trees)) for forest in forests]
    columns = min(4, max(counts))
    rows = [math.ceil(count / columns) for count in counts]
    figure = Figure(figsize=(4 * columns, 4 * sum(rows) + 1), layout="constrained")
    at = places(forests[0].topology)
    deepest = 0
    for part, forest in enumerate(forests):
        for panel in range(counts[part]):
            axes = figure.add_subplot(sum(rows), columns, sum(rows[:part]) * columns + panel + 1)
            deepest = max(deepest, _tree(axes, forest, panel, at, bottleneck))
    hops = [Line2D([], [], color=_SHADES[hop % len(_SHADES)], label=f"hop {hop + 1}") for hop in range(deepest)]
    limit = [Line2D([], [], color=_LIMIT, linewidth=5, alpha=0.6, label="bottleneck")] if bottleneck else []
    figure.legend(handles=[*hops, *limit], loc="outside lower center", ncols=8)
    parts = []
    for forest, count in zip(forests, counts, strict=True):
        what = (
            {"reduce_scatter": "reduction", "allgather": "broadcast"}.get(forest.collective)
            if len(forests) > 1
            else None
        )
        more = f", {count} of {len(forest.trees)} trees" if count < len(forest.trees) else ""
        parts.append(f"{what or forest.collective}{more}")
    figure.suptitle(f"{name}: {'all-reduce, ' if len(forests) > 1 else ''}{', then '.join(parts)}")
    return figure


def _tree(axes: "Axes", forest: "Forest", number: int, at: Places, bottleneck: Collection[Link]) -> int:
    """One tree; its depth."""
    for u, v in bottleneck:
        (x, y), (to_x, to_y) = at[u], at[v]
        axes.plot([x, to_x], [y, to_y], color=_LIMIT, linewidth=5, alpha=0.6, zorder=0)
    tree = forest.trees[number]
    start = int(forest.flat.edge_start[number])
    depths = forest.flat.depth[start : start + len(tree.edges)].tolist()
    for path, depth in zip(tree.paths, depths[::-1] if forest.reducing else depths, strict=True):
        for u, v in pairwise(path):
            arrow = {"arrowstyle": "->", "color": _SHADES[(depth - 1) % len(_SHADES)], "lw": 1.0}
            axes.annotate("", at[v], at[u], arrowprops=arrow)
    draw_nodes(axes, forest.topology, at)
    way = "to" if forest.reducing else "from"
    share = forest.shares()[number]
    axes.set_title(f"{way} {tree.root}: {float(100 * share):.3g} % of the message", fontsize="small")
    return max(depths, default=0)
