"""Slurm's own description of the network: topology.conf (tree or block) and topology.yaml."""

import re
from collections.abc import Mapping
from itertools import pairwise, product
from typing import Any

from trainkit.collectives._topology import Topology, TopologyError
from trainkit.collectives.fabrics._build import Links, both, build

_MOST_HOSTS = 100_000
ROOT = "core"
"""What joins the topmost switches of a file that names several."""


def is_slurm(text: str) -> bool:
    """Whether a text looks like one of the three forms."""
    if re.search(r"(?im)^\s*(SwitchName|BlockName)\s*=", text):
        return True
    return bool(re.search(r"(?m)^\s*-?\s*topology:\s*\S", text) and re.search(r"(?m)^\s+(tree|block):\s*$", text))


def slurm_places(text: str) -> dict[str, tuple[str, ...]]:
    """Host -> the switches (or the block) above it, the highest first.

    Raises:
        TopologyError: a host or a switch is below two others (one place each: routes over several spines are no tree), or
            a switch is above itself.
    """
    if re.search(r"(?im)^\s*(SwitchName|BlockName)\s*=", text):
        entries = [_fields(line) for line in re.sub(r"\\\n", " ", text).splitlines()]
    else:
        entries = _yaml(text)
    parent: dict[str, str] = {}
    place: dict[str, str] = {}
    for entry in entries:
        name = entry.get("switchname") or entry.get("blockname")
        if not name:
            continue
        for table, what, members in (
            (parent, "switch", entry.get("switches", "")),
            (place, "host", entry.get("nodes", "")),
        ):
            for member in host_list(members):
                if table.setdefault(member, name) != name:
                    raise TopologyError(
                        f"{what} {member!r} is below {table[member]!r} and below {name!r}: a tree has one place for each; "
                        "name the spines as one switch"
                    )
    paths = {}
    for host, leaf in place.items():
        above = [leaf]
        while above[0] in parent:
            above.insert(0, parent[above[0]])
            if len(above) > len(parent) + 1:
                raise TopologyError(f"switch {leaf!r} is above itself")
        paths[host] = tuple(above)
    return paths


def from_slurm(text: str, *, nic: int = 50, oversubscription: int = 1) -> Topology:
    """The network that Slurm's file describes; it has no rates, so they are given.

    Args:
        text: topology.conf or topology.yaml.
        nic: GB/s of a host's adapters together.
        oversubscription: what a switch takes from below over what it gives upwards.

    Raises:
        TopologyError: as `slurm_places`, or no host is in it.
    """
    paths = slurm_places(text)
    if not paths:
        raise TopologyError("no hosts: topology.conf has lines SwitchName=... Nodes=... or BlockName=... Nodes=...")
    if len({path[0] for path in paths.values()}) > 1:
        paths = {host: (ROOT, *path) for host, path in paths.items()}
    links: Links = []
    below: dict[tuple[str, str], int] = {}
    for host, path in paths.items():
        links += both(host, path[-1], nic)
        for upper, lower in pairwise(path):
            below[lower, upper] = below.get((lower, upper), 0) + 1
    for (lower, upper), hosts in below.items():
        links += both(lower, upper, max(1, nic * hosts // oversubscription))
    return build(f"{len(paths)} hosts", list(paths), links, "GB/s")


def _fields(line: str) -> dict[str, str]:
    return {key.lower(): value for key, value in re.findall(r"(\w+)\s*=\s*(\S+)", line.partition("#")[0])}


def _yaml(text: str) -> list[dict[str, str]]:
    """The first tree or block topology of a topology.yaml, as topology.conf would have it."""
    import yaml

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TopologyError(f"this is not YAML: {error}") from None
    found: list[Any] = data if isinstance(data, list) else [data]
    for one in found:
        for kind, many, own in (("tree", "switches", "switch"), ("block", "blocks", "block")):
            if isinstance(one, Mapping) and isinstance(one.get(kind), Mapping):
                entries = one[kind].get(many)
                if not isinstance(entries, list) or not all(isinstance(e, Mapping) and own in e for e in entries):
                    raise TopologyError(f"{kind} must hold a list of {many}, each with its {own}, got {entries!r}")
                return [
                    {
                        f"{own}name": str(entry[own]),
                        "switches": str(entry.get("children") or ""),
                        "nodes": str(entry.get("nodes") or ""),
                    }
                    for entry in entries
                ]
    raise TopologyError("topology.yaml must hold a topology with a tree or with blocks")


def host_list(text: str) -> list[str]:
    """Slurm's host lists: "a[0-2,7],b" is a0, a1, a2, a7, b; "n[01-03]" keeps the zeros."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        parts = [
            _numbers(part[1:-1]) if part[0] == "[" else [part] for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", item)
        ]
        names += ["".join(name) for name in product(*parts)]
        if len(names) > _MOST_HOSTS:
            raise TopologyError(f"{text[:60]!r} stands for more than {_MOST_HOSTS} names")
    return names


def _numbers(text: str) -> list[str]:
    found: list[str] = []
    for part in text.split(","):
        ends = part.split("-")
        if len(ends) > 2 or not all(end.isdigit() for end in ends) or int(ends[-1]) - int(ends[0]) > _MOST_HOSTS:
            raise TopologyError(f"a range of a host list is like 0-7, got {part!r}")
        found += [str(n).zfill(len(ends[0])) for n in range(int(ends[0]), int(ends[-1]) + 1)]
    return found
