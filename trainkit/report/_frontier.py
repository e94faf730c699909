"""The page of a search for topologies: what was found, each one's graph and cabling list, and when it is the best."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

from trainkit.report._chart import Line, Mark, chart
from trainkit.report._network import graph
from trainkit.report._page import page, section, table


def frontier_page(
    title: str,
    found: Sequence[tuple[Mapping[str, object], Sequence[tuple[str, str]]]],
    times: Mapping[str, tuple[Sequence[float], Sequence[float]]],
) -> str:
    """The self-contained HTML of the topologies that were found.

    Args:
        title: of the page.
        found: of each topology its `name`, `t_l` (steps), `t_b` and `t_b_reverse` (Fractions as text, in units of message
            over a host's bandwidth), and its directed cables.
        times: name to message sizes in bytes and seconds of an all-reduce.
    """
    marks = [
        Mark(_of(row, "t_l"), _of(row, "t_b"), f"{row['name']}: {row['t_l']} steps, T_B {row['t_b']}")
        for row, _ in found
    ]
    line = Line("", [mark.x for mark in marks], [mark.y for mark in marks], colour=5)
    lines = [Line(name, *curve, colour=at) for at, (name, curve) in enumerate(times.items())]
    parts = [
        section(
            "Found",
            "Fewer steps suit short messages, a smaller T_B long ones; nothing here is beaten in both.",
            table(
                ("topology", "steps", "T_B all-gather", "T_B reduce-scatter"),
                [[str(row[key]) for key in ("name", "t_l", "t_b", "t_b_reverse")] for row, _ in found],
                caption="topologies",
            ),
            chart("Steps against T_B", [line], x="steps", y="T_B, message over bandwidth", marks=marks),
            chart("Time of an all-reduce", lines, x="message, bytes", y="seconds", log_x=True, log_y=True),
        )
    ]
    parts += [_topology(str(row["name"]), links) for row, links in found]
    return page(title, "topologies that can be cabled", parts)


def _topology(name: str, links: Sequence[tuple[str, str]]) -> str:
    nodes = sorted({end for link in links for end in link}, key=lambda node: (len(node), node))
    places = {
        node: (math.sin(2 * math.pi * at / len(nodes)), math.cos(2 * math.pi * at / len(nodes)))
        for at, node in enumerate(nodes)
    }
    index = {link: at for at, link in enumerate(dict.fromkeys(links))}
    ports: dict[str, list[str]] = {node: [] for node in nodes}
    for u, v in links:
        ports[u].append(v)
    rows = [[node, ", ".join(ports[node])] for node in nodes]
    cabling = table(("host", "its ports lead to"), rows, caption=f"cabling of {name}", text=True)
    return section(name, "The graph, and where each host's outgoing ports lead.", graph(places, (), index, ()), cabling)


def _of(row: Mapping[str, object], key: str) -> float:
    return float(Fraction(str(row[key])))
