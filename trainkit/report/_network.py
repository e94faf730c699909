"""The page of a plan: the network with its bottleneck, the trees one by one, the chunks as they move, the times."""

import html
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from trainkit.report._chart import Line, chart, data
from trainkit.report._page import page, section, table

_TREES, _OPS = 200, 5000
"""So many a reader may look through; more would make the page heavy, and the page says that there are more."""
_LABELLED = 40

Link = tuple[str, str]


def network_page(
    name: str,
    facts: Sequence[tuple[str, str]],
    places: Mapping[str, tuple[float, float]],
    switches: Collection[str],
    links: Mapping[Link, str],
    bottleneck: Collection[Link],
    trees: Sequence[tuple[str, str, Sequence[Sequence[str]]]],
    waves: Sequence[Sequence[tuple[str, Sequence[str]]]],
    times: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> str:
    """The self-contained HTML of a plan.

    Args:
        name: of the network.
        facts: what the plan says, as name and value.
        places: node to its place, from -1 to 1 each way.
        switches: nodes that hold no data.
        links: directed link to its capacity, as text.
        bottleneck: the links of the bottleneck cut.
        trees: of each its description, its root and its paths.
        waves: of each moment the movements: a description and the path.
        times: algorithm to message sizes in bytes and predicted seconds.
    """
    index = {link: at for at, link in enumerate(links)}
    shown: list[dict[str, Any]] = [
        {"text": text, "root": root, "links": sorted({index[hop] for path in paths for hop in pairwise(path)})}
        for text, root, paths in trees[:_TREES]
    ]
    moments = list(_moments(waves, index))
    drawing = graph(places, switches, index, bottleneck)
    chosen = "".join(f'<option value="{at}">{html.escape(tree["text"])}</option>' for at, tree in enumerate(shown))
    more = f" The first {_TREES} of {len(trees)} are here." if len(trees) > _TREES else ""
    cut = f" The first {len(moments)} of {len(waves)} moments are here." if len(moments) < len(waves) else ""
    network = (
        f'<div class="network">{drawing}<label>Tree <select><option value="">none: the bottleneck cut</option>{chosen}</select>'
        f"</label>"
        f'<label>Moment <input type="range" min="0" max="{len(moments)}" value="0"></label><output></output>'
        f"{data({'trees': shown, 'moments': moments})}</div>"
    )
    about = (
        "Circles hold data, squares forward it. Dashed: the links of the bottleneck cut, which no schedule can relieve. Choose a "
        f"tree to see the links that it takes, or move through the moments to see the chunks travel.{more}{cut}"
    )
    said = table(("fact", "value"), facts, caption="plan", text=True)
    parts = [section("Plan", "What the network can do.", said), section("Network", about, network)]
    if times:
        lines = [Line(way, *curve, colour=at) for at, (way, curve) in enumerate(times.items())]
        drawn = chart("Predicted time", lines, x="message, bytes", y="seconds", log_x=True, log_y=True)
        parts.append(
            section("Times", "Predicted from capacities and latencies for an all-reduce of one message.", drawn)
        )
    rows = [[f"{u} → {v}", capacity, "yes" if (u, v) in bottleneck else ""] for (u, v), capacity in links.items()]
    parts.append(
        section("Links", "Each direction by itself.", table(("link", "capacity", "in the cut"), rows, caption="links"))
    )
    return page(name, "a plan for this network", parts)


def _moments(
    waves: Iterable[Sequence[tuple[str, Sequence[str]]]], index: Mapping[Link, int]
) -> Iterable[dict[str, Any]]:
    left = _OPS
    for wave in waves:
        left -= len(wave)
        if left < 0:
            return
        used = sorted({index[hop] for _, path in wave for hop in pairwise(path)})
        yield {"links": used, "text": [text for text, _ in wave]}


def graph(
    places: Mapping[str, tuple[float, float]],
    switches: Collection[str],
    index: Mapping[Link, int],
    cut: Collection[Link],
) -> str:
    """A network as SVG: circles for hosts, squares for switches, a line for each direction of a link."""

    def at(node: str) -> tuple[float, float]:
        x, y = places[node]
        return 500 + 430 * x, 400 - 350 * y

    parts = []
    for u, v in index:
        (x, y), (to_x, to_y) = at(u), at(v)
        length = max(((to_x - x) ** 2 + (to_y - y) ** 2) ** 0.5, 1.0)
        # two directions of a cable lie beside each other
        aside = (3 * (y - to_y) / length, 3 * (to_x - x) / length)
        ends = (x + aside[0], y + aside[1], to_x + aside[0], to_y + aside[1])
        kind = "link cut" if (u, v) in cut else "link"
        line = '<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}"/>'.format(kind, *ends)
        parts.append(line)
    for node in places:
        x, y = at(node)
        if node in switches:
            parts.append(
                f'<rect data-node="{html.escape(node)}" x="{x - 10:.1f}" y="{y - 10:.1f}" width="20" height="20"/>'
            )
        else:
            parts.append(f'<circle data-node="{html.escape(node)}" cx="{x:.1f}" cy="{y:.1f}" r="11"/>')
        if len(places) <= _LABELLED:
            parts.append(f'<text x="{x:.1f}" y="{y - 15:.1f}">{html.escape(node)}</text>')
    about = f"{len(places) - len(switches)} compute nodes, {len(switches)} switches, {len(index)} links, {len(cut)} in the cut"
    return f'<svg class="graph" viewBox="0 0 1000 800" role="img" aria-label="{about}">{"".join(parts)}</svg>'
