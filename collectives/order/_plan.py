"""The plan of ranks that launchers read: hosts in order, their racks and addresses, as a small JSON file."""

import ipaddress
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainkit.collectives.order._check import OrderError
from trainkit.collectives.order._network import natural

VERSION = 1


@dataclass(frozen=True)
class Arrival:
    """A host that wants a rank."""

    names: tuple[str, ...]
    """What it may be called, the surest first: names and addresses."""
    rack: str | None = None
    """Where it stands, if it knows."""


@dataclass(frozen=True)
class RankPlan:
    """Hosts in the order in which they shall get ranks.

    Example:
        >>> plan = RankPlan(["a", "c", "b"], racks={"a": "r0", "c": "r0", "d": "r0"})
        >>> plan.place([Arrival(("a",)), Arrival(("b",)), Arrival(("c",)), Arrival(("d",))])
        [0, 2, 3, 1]
    """

    hosts: Sequence[str]
    """In rank order."""
    racks: Mapping[str, str] = field(default_factory=dict)
    """Host -> rack, also of hosts that may join later."""
    addresses: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Host -> other names of it."""
    about: Mapping[str, Any] = field(default_factory=dict)
    """Where the order comes from; carried along."""

    def __post_init__(self) -> None:
        """Check the rules."""
        hosts = tuple(self.hosts)
        object.__setattr__(self, "hosts", hosts)
        if not hosts:
            raise OrderError("a plan of ranks has at least one host, got none")
        for name in hosts:
            # names go into line-based files of other programs
            if not isinstance(name, str) or not name or any(not c.isprintable() or c.isspace() for c in name):
                raise OrderError(f"a host's name must be text without blanks, got {name!r}")
            if hosts.count(name) > 1:
                raise OrderError(f"a plan names each host once, {name!r} appears {hosts.count(name)} times")
        for key in ("racks", "addresses", "about"):
            if not isinstance(getattr(self, key), Mapping):
                raise OrderError(f"{key} of a plan must be an object, got {getattr(self, key)!r}")
        if not all(isinstance(rack, str) for rack in self.racks.values()):
            raise OrderError("racks of a plan must be {host: rack}, both text")
        for host, names in self.addresses.items():
            if host not in hosts or isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise OrderError(
                    f"addresses of a plan must be {{host: [address, ...]}} for its hosts, got {host!r}: {names!r}"
                )

    @classmethod
    def load(cls, path: str | Path) -> "RankPlan":
        """Read a plan.

        Raises:
            OrderError: it is no plan of a version that is known here.
            OSError: it cannot be read.
        """
        try:
            data = json.loads(Path(path).read_text())
        except ValueError as error:
            raise OrderError(f"{path} is not JSON: {error}") from None
        if not isinstance(data, dict) or data.get("version") != VERSION:
            found = data.get("version") if isinstance(data, dict) else type(data).__name__
            raise OrderError(
                f"{path} must be a plan of ranks of version {VERSION}, got {found!r}: write it with `trainkit order`"
            )
        unknown = set(data) - {"version", "hosts", "racks", "addresses", "about"}
        if unknown or not isinstance(data.get("hosts"), list):
            wrong = f"the unknown key {sorted(unknown)[0]!r}" if unknown else "no list of hosts"
            raise OrderError(f"{path} is no plan of ranks: it has {wrong}")
        return cls(**{key: value for key, value in data.items() if key != "version"})

    def text(self) -> str:
        """What `load` reads."""
        return json.dumps({"version": VERSION, **asdict(self)}, indent=1) + "\n"

    def position(self, arrival: Arrival) -> int | None:
        """Which of the plan's hosts this is; None if it is none of them."""
        known = self._known()
        return next((known[name.lower()] for name in arrival.names if name.lower() in known), None)

    def place(self, arrived: Sequence[Arrival]) -> list[int]:
        """The rank of each host that is there.

        Hosts of the plan keep its order, whoever is missing. Another host comes behind its rack's last host of the plan,
        or last of all. Every host's place follows from the plan and its name alone, so one that leaves and returns finds
        its place again.
        """

        def key(number: int) -> tuple[float, bool, Any, int]:
            arrival = arrived[number]
            at = self.position(arrival)
            if at is not None:
                return at, False, (), number
            rack = arrival.rack or next((self.racks[name] for name in arrival.names if name in self.racks), None)
            beside = [at for at, host in enumerate(self.hosts) if rack is not None and self.racks.get(host) == rack]
            return max(beside, default=len(self.hosts)), True, natural(arrival.names[0]), number

        ranks = [0] * len(arrived)
        for rank, number in enumerate(sorted(range(len(arrived)), key=key)):
            ranks[number] = rank
        return ranks

    def _known(self) -> dict[str, int]:
        """Every name of a host -> its position; a first label counts where no two hosts share it."""
        short: dict[str, int | None] = {}
        known: dict[str, int] = {}
        for at, host in enumerate(self.hosts):
            for name in (host, *self.addresses.get(host, ())):
                known.setdefault(name.lower(), at)
            if not _is_address(host):
                label = host.lower().split(".")[0]
                short[label] = at if short.get(label, at) == at else None
        return {label: at for label, at in short.items() if at is not None} | known


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
