"""`trainkit topology show`: one topology's figures, picture, cabling list and schedule."""

import json
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from trainkit._files import write_text_atomically
from trainkit.cli._picture import check_picture, save_picture
from trainkit.cli._quantities import bytes_per_second, seconds, size_text, sizes, time_text
from trainkit.cli._subcommand import Subcommand

if TYPE_CHECKING:
    from trainkit.collectives.direct import FoundTopology


@dataclass(frozen=True)
class Options:
    """Options of the view."""

    name: str = field(metadata={"positional": True})
    """the topology as `topology find` names it: torus(4, 8), line(kautz(4, 20)), cayley(metacyclic(8, 2, 7), 1, 10, 12, 3)"""
    alpha: str = "10us"
    """latency of a step"""
    bandwidth: str = "100Gbps"
    """bandwidth of a host, all ports together"""
    bytes: str = "1KiB..1GiB"
    """message sizes to predict"""
    draw: str | None = None
    """write the picture to this file (.svg, .png, .pdf)"""
    cabling: str | None = None
    """write the cabling list to this file (CSV)"""
    hosts: str | None = None
    """file with the hosts' names, one a line, for the cabling list"""
    schedule: str | None = None
    """write the schedule to this file (JSON)"""
    collective: str = "allreduce"
    """collective of the schedule: allgather, reduce_scatter or allreduce"""
    max_chunks: int = 64
    """most chunks a shard is cut into"""
    json: bool = False
    """print JSON"""


def _facts(one: "FoundTopology", options: Options) -> dict[str, object]:
    from trainkit.collectives.direct import least_steps

    alpha, bandwidth = seconds(options.alpha), bytes_per_second(options.bandwidth)
    cost = one.bfb
    split, split_back = (cost.chunking(options.max_chunks, reverse=reverse) for reverse in (False, True))
    return {
        "name": one.name,
        "nodes": cost.nodes,
        "degree": cost.degree,
        "links": "two-way" if cost.digraph.symmetric else "one-way",
        "t_l": one.t_l,
        "t_l_reverse": one.t_l_reverse,
        "least_t_l": least_steps(cost.nodes, cost.degree, directed=not cost.digraph.symmetric),
        "t_b": str(one.t_b),
        "t_b_reverse": str(one.t_b_reverse),
        "least_t_b": str(Fraction(cost.nodes - 1, cost.nodes)),
        "steps": [str(load) for load in cost.steps],
        "chunks": [split.chunks, split_back.chunks],
        "chunking_loss": [float(split.loss), float(split_back.loss)],
        "allreduce_seconds": {size_text(size): one.seconds(size, alpha, bandwidth) for size in sizes(options.bytes)},
    }


def _show(facts: dict[str, object]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", str(facts["name"]))
    times: dict[str, float] = facts.pop("allreduce_seconds")  # type: ignore[assignment]
    rows = [
        ("hosts x ports", f"{facts['nodes']} x {facts['degree']}, {facts['links']} links"),
        ("steps, all-gather and reduce-scatter", f"{facts['t_l']} and {facts['t_l_reverse']}, least {facts['least_t_l']}"),
        ("T_B in M/B", f"{facts['t_b']} and {facts['t_b_reverse']}, least {facts['least_t_b']}"),
        ("load of the busiest link, step by step", " ".join(facts["steps"])),  # type: ignore[arg-type]
        ("chunks a shard", "{} and {}, bandwidth lost {:.2%} and {:.2%}".format(*facts["chunks"], *facts["chunking_loss"])),  # type: ignore[misc]
        *((f"all-reduce of {size}", time_text(value)) for size, value in times.items()),
    ]  # fmt: skip
    for row in rows:
        table.add_row(*row)
    Console(soft_wrap=True).print(table)


def run(options: Options) -> int:
    """Build, print, write."""
    from trainkit.collectives.direct import named_topology

    check_picture("--draw", options.draw)
    one = named_topology(options.name)
    hosts = Path(options.hosts).read_text().split() if options.hosts else None
    facts = _facts(one, options)
    if options.draw:
        save_picture(one.draw(), options.draw)
    if options.cabling:
        write_text_atomically(Path(options.cabling), one.cabling_csv(hosts))
    if options.schedule:
        bandwidth = Fraction(bytes_per_second(options.bandwidth))
        schedule = one.bfb.schedule(
            options.collective,  # type: ignore[arg-type]
            max_chunks=options.max_chunks,
            bandwidth=bandwidth,
            unit="B/s",
        )
        schedule.save(options.schedule)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        _show(facts)
        for what in ("draw", "cabling", "schedule"):
            if getattr(options, what):
                print(f"written: {getattr(options, what)}")
    return 0


SUBCOMMAND = Subcommand(
    name="topology show",
    summary="Show one topology: its figures, and on request a picture, the cabling list and the schedule.",
    options=Options,
    run=run,
    example="trainkit topology show 'torus(4, 8)' --draw torus.svg --cabling torus.csv --schedule torus.json",
)
