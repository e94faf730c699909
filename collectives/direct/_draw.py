"""A topology as a picture: hosts on a circle, links as chords."""

from math import cos, pi, sin
from typing import TYPE_CHECKING

from trainkit.collectives.direct._digraph import Digraph

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Beyond these the picture shows the pattern only.
_LABELLED = 64
_ARROWS = 600


def draw(graph: Digraph, title: str) -> "Figure":
    """Hosts on a circle by number; one-way links are arrows where there are few."""
    from matplotlib.collections import LineCollection
    from matplotlib.figure import Figure

    place = [(sin(2 * pi * at / graph.nodes), cos(2 * pi * at / graph.nodes)) for at in range(graph.nodes)]
    links = sorted({(min(u, v), max(u, v)) if graph.symmetric else (u, v) for u, v in graph.pairs() if u != v})
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.add_subplot()
    if graph.symmetric or len(links) > _ARROWS:
        width = max(0.1, min(1.0, 200 / len(links)))
        chords = [[place[u], place[v]] for u, v in links]
        axes.add_collection(LineCollection(chords, colors="tab:blue", linewidths=width, alpha=0.6))
    else:
        for u, v in links:
            axes.annotate("", place[v], place[u], arrowprops={"arrowstyle": "->", "color": "tab:blue", "alpha": 0.6})
    axes.scatter([x for x, _ in place], [y for _, y in place], s=max(2, 400 / graph.nodes), color="black", zorder=2)
    if graph.nodes <= _LABELLED:
        for at, (x, y) in enumerate(place):
            axes.text(1.07 * x, 1.07 * y, str(at), ha="center", va="center", fontsize="small")
    axes.set(title=title, xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal")
    axes.axis("off")
    return figure
