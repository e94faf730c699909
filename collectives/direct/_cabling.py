"""From links to cables: which port of which host goes to which."""

import csv
from collections import defaultdict
from collections.abc import Sequence
from io import StringIO
from typing import NamedTuple

from trainkit.collectives.direct._digraph import Digraph


class Cable(NamedTuple):
    """One cable; one-way topologies use only its fibre from `host` to `peer`."""

    host: int
    """One end; of a one-way link the sender."""
    port: int
    """Port of the host; one-way links number sending ports and receiving ports apart."""
    peer: int
    """The other end."""
    peer_port: int
    """Port of the other end."""


def cables(graph: Digraph) -> list[Cable]:
    """The cabling list, by host.

    Where every link has one the other way, a full-duplex cable serves both; else every link is a fibre of its own
    from a sending to a receiving port. Self-loops are left out: their ports stay free.
    """
    if graph.symmetric:
        ends = sorted((u, v) for u, v in graph.pairs() if u < v)
        sending = receiving = defaultdict[int, int](int)
    else:
        ends = sorted((u, v) for u, v in graph.pairs() if u != v)
        sending, receiving = defaultdict[int, int](int), defaultdict[int, int](int)
    found = []
    for u, v in ends:
        found.append(Cable(u, sending[u], v, receiving[v]))
        sending[u] += 1
        receiving[v] += 1
    return found


def cabling_csv(graph: Digraph, hosts: Sequence[str] | None = None) -> str:
    """The cabling list as CSV with a header.

    Args:
        graph: the topology.
        hosts: names of the hosts; None calls them by number.

    Raises:
        ValueError: the number of names is not N.
    """
    names = [str(at) for at in range(graph.nodes)] if hosts is None else list(hosts)
    if len(names) != graph.nodes:
        raise ValueError(f"the topology has {graph.nodes} hosts, got {len(names)} names")
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if graph.symmetric:
        writer.writerow(["host", "port", "peer", "peer_port"])
    else:
        writer.writerow(["from_host", "sending_port", "to_host", "receiving_port"])
    writer.writerows([names[c.host], c.port, names[c.peer], c.peer_port] for c in cables(graph))
    return out.getvalue()
