"""Networks read from `ibnetdiscover`."""

import re
from collections import defaultdict
from fractions import Fraction

from trainkit.collectives._topology import Topology, TopologyError

_LANE = {
    "SDR": Fraction(2),
    "DDR": Fraction(4),
    "QDR": Fraction(8),
    "FDR10": Fraction(10),
    "FDR": Fraction("13.64"),
    "EDR": Fraction(25),
    "HDR": Fraction(50),
    "NDR": Fraction(100),
    "XDR": Fraction(200),
}
"""Gbit/s of data on a lane, less its coding (InfiniBand Architecture Specification, volume 2)."""
_DEVICE = re.compile(r'^(Switch|Ca|Rt)\s+\d+\s+"([^"]+)"\s*#\s*"([^"]*)"', re.MULTILINE)
_PORT = re.compile(r'^\[\d+\](?:\([^)]*\))?\s*"([^"]+)"\[\d+\][^#\n]*(?:#.*?(\d+)x(FDR10|[A-Z]{3})\s*$)?')


def from_ibnetdiscover(text: str) -> Topology:
    """The fabric that `ibnetdiscover` found: hosts are compute nodes, their adapters count as one.

    Raises:
        TopologyError: there are no hosts, a port names an unknown device, or a line has no width and speed.
    """
    devices = list(_DEVICE.finditer(text))
    host: dict[str, str] = {}
    switches: list[str] = []
    for match in devices:
        kind, identity, words = match.groups()
        if kind == "Ca":
            host[identity] = words.split()[0] if words.split() else identity
        else:
            switches.append(identity)
            host[identity] = f"{words.split(';')[0].strip() or 'switch'} {identity}"
    if len({host[i] for i in host if i not in switches}) < 2:
        raise TopologyError("this is not the output of `ibnetdiscover` of a fabric: it names fewer than two hosts (Ca)")
    total: dict[tuple[str, str], Fraction] = defaultdict(Fraction)
    for match, after in zip(devices, [*devices[1:], None], strict=True):
        here = match[2]
        body = text[match.end() : after.start() if after else len(text)]
        for line in body.splitlines():
            if not line.startswith("["):
                continue
            port = _PORT.match(line)
            if port is None or port[1] not in host:
                raise TopologyError(
                    f"device {match[3]!r}: the port {line.strip()[:60]!r} leads to no device of the file"
                )
            if port[2] is None or port[3] not in _LANE:
                raise TopologyError(
                    f"device {match[3]!r}: the port {line.strip()[:60]!r} has no width and speed such as 4xHDR"
                )
            total[host[here], host[port[1]]] += int(port[2]) * _LANE[port[3]]
    compute = list(dict.fromkeys(host[i] for i in host if i not in switches))
    nodes = [*compute, *(host[i] for i in switches)]
    links = [(u, v, rate) for (u, v), rate in total.items() if u != v]
    return Topology("InfiniBand fabric", nodes, compute, links, unit="Gbit/s")
