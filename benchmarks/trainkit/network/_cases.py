"""The emulated networks of this benchmark, rates in Mbit/s: a quarter of the cases' own."""

from dataclasses import replace

from trainkit.collectives import Topology
from trainkit.collectives.fabrics import mesh, star

Pairs = list[tuple[str, str, int | str]]


def _built(name: str, compute: list[str], switches: list[str], pairs: Pairs) -> Topology:
    links = [link for u, v, rate in pairs for link in ((u, v, rate), (v, u, rate))]
    return Topology(name, [*compute, *switches], compute, links, unit="Mbit/s")


def two_islands() -> Topology:
    """E1: two islands of four on a switch each (50), every rank with a thin uplink (6.25) to one spine."""
    pairs: Pairs = []
    for g in range(2):
        for i in range(4):
            pairs += [(f"g{g}_{i}", f"w{g}", 50), (f"g{g}_{i}", "S", "6.25")]
    return _built("E1 two islands", [f"g{g}_{i}" for g in range(2) for i in range(4)], ["w0", "S", "w1"], pairs)


def one_slow() -> Topology:
    """E2: eight on one switch (25), the first at a quarter."""
    return star(["6.25", *["25"] * 7], unit="Mbit/s")


def mesh_3x3() -> Topology:
    """E3: nine in a square grid (12.5)."""
    return mesh((3, 3), "12.5", unit="Mbit/s")


def two_cliques() -> Topology:
    """E7: two cliques of four (25), joined pair by pair at 10, 5, 5 and 2.5."""
    pairs: Pairs = [(str(g + i), str(g + j), 25) for g in (0, 4) for i in range(4) for j in range(i + 1, 4)]
    pairs += [("0", "4", 10), ("1", "5", 5), ("2", "6", 5), ("3", "7", "2.5")]
    return _built("E7 two cliques", [str(i) for i in range(8)], [], pairs)


def racks(sizes: tuple[int, ...], host: int | str, uplinks: tuple[int | str, ...], slow: int = 0) -> Topology:
    """Racks of hosts on a switch each, the switches on one core.

    Args:
        sizes: hosts of each rack.
        host: Mbit/s of a host's link.
        uplinks: Mbit/s of each rack's link to the core.
        slow: Mbit/s of the first rack's last host; 0: as the others.
    """
    pairs: Pairs = []
    for rack, size in enumerate(sizes):
        rates = [host] * (size - 1) + [slow if slow and rack == 0 else host]
        pairs += [(f"h{rack}_{i}", f"rack{rack}", rate) for i, rate in enumerate(rates)]
        pairs.append((f"rack{rack}", "core", uplinks[rack]))
    compute = [f"h{rack}_{i}" for rack, size in enumerate(sizes) for i in range(size)]
    switches = [*(f"rack{rack}" for rack in range(len(sizes))), "core"]
    return _built(f"racks of {', '.join(map(str, sizes))}", compute, switches, pairs)


def two_racks() -> Topology:
    """The datacenter: two racks of four (100), uplinks a quarter of a host's link."""
    return racks((4, 4), 100, (25, 25))


def four() -> Topology:
    """Two racks of two (50) on thin uplinks (12.5), for several ranks a host."""
    return racks((2, 2), 50, ("12.5", "12.5"))


def sixteen() -> Topology:
    """Racks of 4, 4 and 8 hosts (12) on uplinks of 24, 24 and 32 (3:1 oversubscribed); one host of the first has 4."""
    return racks((4, 4, 8), 12, (24, 24, 32), slow=4)


def interleaved() -> Topology:
    """The datacenter, its ranks dealt over the racks in turn: what a launcher that knows nothing gives."""
    given = two_racks()
    return replace(given, compute_nodes=[given.compute_nodes[i] for i in (0, 4, 1, 5, 2, 6, 3, 7)])


CASES = {
    "E1": two_islands,
    "E2": one_slow,
    "E3": mesh_3x3,
    "E7": two_cliques,
    "racks": two_racks,
    "DC": interleaved,
    "4": four,
    "16": sixteen,
}
