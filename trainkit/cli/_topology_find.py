"""`trainkit topology find`: the best ways to cable N hosts of d ports."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit.cli._quantities import bytes_per_second, seconds, size_text, sizes, time_text
from trainkit.cli._subcommand import Subcommand

if TYPE_CHECKING:
    from trainkit.collectives.direct import Frontier, Progress


@dataclass(frozen=True)
class Options:
    """Options of the search."""

    nodes: int
    """hosts"""
    degree: int
    """ports a host"""
    bidirectional: bool = False
    """only topologies whose links carry both ways"""
    seconds: float = 60
    """time budget; the search stops early where nothing better can exist"""
    seed: int = 0
    """seed of the random search"""
    state: str | None = None
    """file to keep the search in: run again to go on"""
    alpha: str = "10us"
    """latency of a step"""
    bandwidth: str = "100Gbps"
    """bandwidth of a host, all ports together"""
    bytes: str = "1KiB..1GiB"
    """message size or range of sizes to choose the best for"""
    html: Path | None = None
    """page of the frontier: each topology's graph and cabling list"""
    json: bool = False
    """print JSON"""


def _rows(frontier: "Frontier") -> list[dict[str, object]]:
    found = sorted({one.name: one for one in (*frontier, *frontier.balanced)}.values(), key=lambda one: one.t_l)
    return [
        {
            "name": one.name,
            "t_l": one.t_l,
            "t_b": str(one.t_b),
            "t_l_reverse": one.t_l_reverse,
            "t_b_reverse": str(one.t_b_reverse),
            "steps_over_moore": one.t_l - frontier.least_t_l,
            "t_b_over_least": float(one.t_b / frontier.least_t_b - 1),
        }
        for one in found
    ]


def _show(frontier: "Frontier", choices: list[dict[str, object]]) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console(soft_wrap=True)
    table = Table(Column("topology", overflow="fold"), "steps", "T_B all-gather", "T_B reduce-scatter", "over least")
    for row in _rows(frontier):
        steps = f"{row['t_l']} (Moore {frontier.least_t_l})"
        over = f"+{row['t_b_over_least']:.2%}"
        table.add_row(str(row["name"]), steps, str(row["t_b"]), str(row["t_b_reverse"]), over)
    console.print(table)
    end = "both bounds are met" if frontier.proven else "no proof that nothing better exists"
    console.print(f"{frontier.tried} Cayley digraphs tried; least T_B {frontier.least_t_b}; {end}")
    best = Table("all-reduce of", "time", "best topology")
    for choice in choices:
        best.add_row(str(choice["size"]), str(choice["time"]), str(choice["name"]))
    console.print(best)


def run(options: Options) -> int:
    """Search and print."""
    alpha, bandwidth, messages = seconds(options.alpha), bytes_per_second(options.bandwidth), sizes(options.bytes)

    from rich.console import Console

    from trainkit.collectives.direct import find_topologies

    console = Console(stderr=True)
    with console.status("searching") as status:

        def tell(progress: "Progress") -> None:
            best = ", ".join(f"({one.t_l}, {one.t_b})" for one in progress.frontier)
            status.update(f"{progress.seconds:.0f} of {options.seconds:.0f} s, {progress.tried} tried: {best}")

        frontier = find_topologies(
            options.nodes,
            options.degree,
            directed=not options.bidirectional,
            seconds=options.seconds,
            seed=options.seed,
            state=options.state,
            progress=tell,
        )
    choices: list[dict[str, object]] = []
    for size in messages:
        best = frontier.best(size, alpha=alpha, bandwidth=bandwidth)
        duration = best.seconds(size, alpha, bandwidth)
        choices.append({"size": size_text(size), "bytes": size, "seconds": duration, "name": best.name})
    if options.html is not None:
        from trainkit._files import write_text_atomically
        from trainkit.report import frontier_page

        title = f"{options.nodes} hosts of {options.degree} ports"
        made = {one.name: one for one in (*frontier, *frontier.balanced)}
        graphs = [(row, [(str(u), str(v)) for u, v in made[str(row["name"])].graph.edges()]) for row in _rows(frontier)]
        times = {
            name: (messages, [one.seconds(size, alpha, bandwidth) for size in messages]) for name, one in made.items()
        }
        write_text_atomically(options.html, frontier_page(title, graphs, times))
    whole = frontier.best(messages, alpha=alpha, bandwidth=bandwidth)
    if options.json:
        said = {
            "nodes": options.nodes,
            "degree": options.degree,
            "directed": not options.bidirectional,
            "least_t_l": frontier.least_t_l,
            "least_t_b": str(frontier.least_t_b),
            "proven": frontier.proven,
            "tried": frontier.tried,
            "topologies": _rows(frontier),
            "choices": choices,
            "best": whole.name,
        }
        print(json.dumps(said, indent=1))
    else:
        _show(frontier, [choice | {"time": time_text(float(str(choice["seconds"])))} for choice in choices])
        print(f"over all sizes: {whole.name}\nsee it: trainkit topology show '{whole.name}'")
    return 0


SUBCOMMAND = Subcommand(
    name="topology find",
    summary="Find the best ways to cable hosts directly: fewest steps, least bandwidth lost.",
    options=Options,
    run=run,
    example="trainkit topology find --nodes 64 --degree 4 --alpha 10us --bandwidth 100Gbps --bytes 1MiB..1GiB",
)
