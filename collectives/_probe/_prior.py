"""A topology that somebody declared: nested groups in YAML, Slurm's topology.conf, or placement labels of a cloud."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainkit.collectives._probe._infer import Declared
from trainkit.collectives._topology import TopologyError
from trainkit.collectives.fabrics._slurm import is_slurm, slurm_places


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

    Slurm's topology.conf and topology.yaml are told by their own words. Anything else is YAML (or JSON): either
    `labels: {host: [region, zone, rack]}`, as clouds label nodes, or a tree `{core: {rack1: [host1, host2], ...}}`
    whose leaves are lists of hosts.

    Raises:
        PriorError: it is neither, or names a host twice.
    """
    text = Path(path).read_text()
    if is_slurm(text):
        try:
            return Prior(slurm_places(text))
        except TopologyError as error:
            raise PriorError(str(error)) from None
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


def _shortened(labels: list[str | None]) -> list[str | None]:
    """The last part of each label where that still tells them apart."""
    last = {label: label.rpartition("/")[2] for label in labels if label}
    unique = len(set(last.values())) == len(last)
    return [last[label] if unique and label else label for label in labels]
