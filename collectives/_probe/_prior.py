"""A topology that somebody declared: nested groups in YAML, Slurm's topology.conf, or placement labels of a cloud."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from trainkit.collectives._probe._infer import Declared

_MOST_HOSTS = 100_000


class PriorError(ValueError):
    """A declared topology that cannot be read."""


@dataclass(frozen=True)
class Prior:
    """Where hosts are said to be."""

    paths: Mapping[str, tuple[str, ...]]
    """Host -> names of the groups that it is in, from the core to its rack."""

    def levels(self, hosts: Sequence[str]) -> list[Declared]:
        """The claims about these hosts, racks first.

        Raises:
            PriorError: none of the hosts is in it.
        """
        known = [self.paths.get(host, self.paths.get(host.partition(".")[0])) for host in hosts]
        if not any(known):
            some = ", ".join(list(self.paths)[:3])
            raise PriorError(f"the declared topology has none of these hosts ({hosts[0]}, ...): it has {some}, ...")
        deepest = max(len(path) for path in known if path)
        claims = []
        for level in range(deepest, 0, -1):
            # Of equal names in different places, such as rack 1 of every row, each is its own group.
            label = ["/".join(path[: len(path) - deepest + level]) or None if path else None for path in known]
            claims.append(Declared(_shortened(label), "the declared topology"))
        return claims


def read_prior(path: str | Path) -> Prior:
    """Read a declaration.

    A file whose lines begin with `SwitchName=` is Slurm's topology.conf. Anything else is YAML (or JSON): either
    `labels: {host: [region, zone, rack]}`, as clouds label nodes, or a tree `{core: {rack1: [host1, host2], ...}}`
    whose leaves are lists of hosts.

    Raises:
        PriorError: it is neither, or names a host twice.
    """
    text = Path(path).read_text()
    if re.search(r"(?im)^\s*SwitchName\s*=", text):
        return _slurm(text)
    import yaml  # type: ignore[import-untyped]

    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise PriorError(f"{path} is not YAML: {error}") from None
    if not isinstance(data, dict):
        raise PriorError(f"{path} must hold a mapping of groups, got {type(data).__name__}")
    if set(data) == {"labels"} and isinstance(data["labels"], dict):
        return Prior({str(host): _labels(host, labels) for host, labels in data["labels"].items()})
    paths: dict[str, tuple[str, ...]] = {}
    _walk(data, (), paths)
    return Prior(paths)


def _labels(host: Any, labels: Any) -> tuple[str, ...]:
    parts = labels.strip("/").split("/") if isinstance(labels, str) else labels
    if not isinstance(parts, list) or not parts or not all(isinstance(part, str | int) for part in parts):
        raise PriorError(f"labels of host {host!r} are a list from the widest to the rack, got {labels!r}")
    return tuple(map(str, parts))


def _walk(data: Any, above: tuple[str, ...], paths: dict[str, tuple[str, ...]]) -> None:
    if isinstance(data, dict):
        for name, below in data.items():
            _walk(below, (*above, str(name)), paths)
    elif isinstance(data, list) and above:
        for host in data:
            if not isinstance(host, str | int):
                raise PriorError(f"group {above[-1]!r} must list names of hosts, got {host!r}")
            _place(str(host), above, paths)
    else:
        raise PriorError(f"group {'/'.join(above)!r} must be a mapping of groups or a list of hosts, got {data!r}")


def _place(host: str, above: tuple[str, ...], paths: dict[str, tuple[str, ...]]) -> None:
    if paths.setdefault(host, above) != above:
        raise PriorError(f"host {host!r} is in {'/'.join(paths[host])} and in {'/'.join(above)}: a host has one place")


def _slurm(text: str) -> Prior:
    parent: dict[str, str] = {}
    leaves: list[tuple[str, list[str]]] = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        fields = {key.lower(): value for key, value in re.findall(r"(\w+)\s*=\s*(\S+)", line.partition("#")[0])}
        if "switchname" not in fields:
            continue
        parent |= dict.fromkeys(_expanded(fields.get("switches", "")), fields["switchname"])
        leaves.append((fields["switchname"], _expanded(fields.get("nodes", ""))))
    paths: dict[str, tuple[str, ...]] = {}
    for switch, hosts in leaves:
        above = [switch]
        while above[0] in parent:
            above.insert(0, parent[above[0]])
            if len(above) > len(parent) + 1:
                raise PriorError(f"switch {switch!r} is above itself")
        for host in hosts:
            _place(host, tuple(above), paths)
    return Prior(paths)


def _expanded(text: str) -> list[str]:
    """Slurm's host lists: "a[0-2,7],b" is a0, a1, a2, a7, b; "n[01-03]" keeps the zeros."""
    names: list[str] = []
    for item in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
        parts = [
            _numbers(part[1:-1]) if part[0] == "[" else [part] for part in re.findall(r"\[[^\]]*\]|[^\[\]]+", item)
        ]
        names += ["".join(name) for name in product(*parts)]
        if len(names) > _MOST_HOSTS:
            raise PriorError(f"{text[:60]!r} stands for more than {_MOST_HOSTS} names")
    return names


def _numbers(text: str) -> list[str]:
    found: list[str] = []
    for part in text.split(","):
        ends = part.split("-")
        if len(ends) > 2 or not all(end.isdigit() for end in ends) or int(ends[-1]) - int(ends[0]) > _MOST_HOSTS:
            raise PriorError(f"a range of a host list is like 0-7, got {part!r}")
        found += [str(n).zfill(len(ends[0])) for n in range(int(ends[0]), int(ends[-1]) + 1)]
    return found


def _shortened(labels: list[str | None]) -> list[str | None]:
    """The last part of each label where that still tells them apart."""
    last = {label: label.rpartition("/")[2] for label in labels if label}
    unique = len(set(last.values())) == len(last)
    return [last[label] if unique and label else label for label in labels]
