"""What a lab writes down of its switch: a YAML file of the switch's address, the workers and the sessions.

switch: {ip: 10.0.0.254, mac: "02:00:00:00:00:fe"}
workers:
- {name: a, mac: "02:00:00:00:00:01", ip: 10.0.0.1, port: 1}
- {name: b, mac: "02:00:00:00:00:02", ip: 10.0.0.2, port: 2}
sessions:
- {name: default, workers: [a, b], slots: 16, elements: 256}
"""

import ipaddress
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from trainkit.switchml._packet import CORE

VERSIONS = 1024
"""Versions of slots that the program has, all sessions together."""
SESSIONS = 64
PORTS = 510
"""Ports are 0 to PORTS - 1; the next is the control plane's."""


class DescriptionError(ValueError):
    """The file says something that no switch can do."""


@dataclass(frozen=True)
class Worker:
    """A host that sends gradients."""

    name: str
    mac: int
    ip: int
    port: int

    @property
    def host(self) -> str:
        """Its IPv4 address as text."""
        return str(ipaddress.IPv4Address(self.ip))

    def __str__(self) -> str:
        return f"worker {self.name} ({self.host}, {mac_text(self.mac)}, port {self.port})"


@dataclass(frozen=True)
class Session:
    """Workers that sum together; rank r is `workers[r]`."""

    name: str
    number: int
    workers: tuple[Worker, ...]
    slots: int
    elements: int
    base: int
    """First version of its slots."""


@dataclass(frozen=True)
class Description:
    """A whole file."""

    ip: int
    mac: int
    workers: tuple[Worker, ...]
    sessions: tuple[Session, ...]


def load(path: str | Path) -> Description:
    """Read a description.

    Raises:
        DescriptionError: the file cannot be read, or breaks one of the rules of docs/how-it-works/p4.md.
    """
    try:
        document = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise DescriptionError(f"{path}: {' '.join(str(error).split())}") from error
    try:
        return _description(document)
    except DescriptionError as error:
        raise DescriptionError(f"{path}: {error}") from None


def mac_text(mac: int) -> str:
    """A MAC address as it is usually written."""
    return ":".join(f"{byte:02x}" for byte in mac.to_bytes(6, "big"))


def _description(document: Any) -> Description:
    _fields(document, "the file", {"switch", "workers", "sessions"})
    _fields(document["switch"], "switch", {"ip", "mac"})
    ip, mac = _ip(document["switch"]["ip"], "switch"), _mac(document["switch"]["mac"], "switch")
    workers = []
    for row in _rows(document["workers"], "workers"):
        _fields(row, f"worker {row.get('name')!r}", {"name", "mac", "ip", "port"})
        what = f"worker {row['name']!r}"
        port = row["port"]
        if type(port) is not int or not 0 <= port < PORTS:
            raise DescriptionError(f"{what}: a port is 0 to {PORTS - 1}, got {port!r}")
        workers.append(Worker(str(row["name"]), _mac(row["mac"], what), _ip(row["ip"], what), port))
    for field in ("name", "mac", "ip"):
        _distinct(field, [("switch", mac if field == "mac" else ip if field == "ip" else None)] +
                  [(f"worker {worker.name!r}", getattr(worker, field)) for worker in workers])  # fmt: skip
    known = {worker.name: worker for worker in workers}
    sessions: list[Session] = []
    for row in _rows(document["sessions"], "sessions"):
        base = sessions[-1].base + 2 * sessions[-1].slots if sessions else 0
        sessions.append(_session(row, len(sessions), base, known))
    _distinct("name", [(f"session {session.name!r}", session.name) for session in sessions])
    used = sum(session.slots for session in sessions)
    if 2 * used > VERSIONS or len(sessions) > SESSIONS:
        raise DescriptionError(
            f"{len(sessions)} sessions with {used} slots, the program has room for {SESSIONS} and {VERSIONS // 2}"
        )
    return Description(ip, mac, tuple(workers), tuple(sessions))


def _session(row: Any, number: int, base: int, known: dict[str, Worker]) -> Session:
    what = f"session {row.get('name')!r}"
    _fields(row, what, {"name", "workers"}, {"slots", "elements"})
    names = [str(name) for name in row["workers"]] if isinstance(row["workers"], list) else []
    if not 1 <= len(names) <= CORE.workers:
        raise DescriptionError(f"{what}: 1 to {CORE.workers} workers a session, got {len(names)}")
    for name in names:
        if name not in known:
            raise DescriptionError(f"{what}: worker {name!r} is not in `workers`")
        if names.count(name) > 1:
            raise DescriptionError(f"{what}: worker {name!r} is there twice")
    slots, elements = row.get("slots", 16), row.get("elements", 256)
    if type(slots) is not int or slots < 1 or slots & (slots - 1):
        raise DescriptionError(f"{what}: slots are a power of two, got {slots!r}")
    if elements not in CORE.elements:
        raise DescriptionError(f"{what}: elements are {' or '.join(map(str, CORE.elements))}, got {elements!r}")
    if not 0 < len(str(row["name"])) <= 64:
        raise DescriptionError(f"{what}: a session's name has 1 to 64 characters")
    return Session(str(row["name"]), number, tuple(known[name] for name in names), slots, elements, base)


def _rows(rows: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise DescriptionError(f"{what} is a list of at least one, each with its fields, got {rows!r}")
    return rows


def _fields(row: Any, what: str, needed: set[str], more: Iterable[str] = ()) -> None:
    got = set(row) if isinstance(row, dict) else set()
    if not needed <= got or not got <= needed | set(more):
        allowed = f"{', '.join(sorted(needed))}" + (f" and may have {', '.join(sorted(more))}" if more else "")
        raise DescriptionError(f"{what} has {allowed}; got {', '.join(sorted(map(str, got))) or 'none'}")


def _distinct(field: str, named: list[tuple[str, Any]]) -> None:
    first: dict[Any, str] = {}
    for what, value in named:
        if value is not None and value in first:
            raise DescriptionError(f"{what} has the {field} of {first[value]}: each has its own")
        first[value] = what


def _ip(text: Any, what: str) -> int:
    try:
        return int(ipaddress.IPv4Address(text))
    except ValueError:
        raise DescriptionError(f"{what}: ip is an IPv4 address, got {text!r}") from None


def _mac(text: Any, what: str) -> int:
    if not isinstance(text, str) or not re.fullmatch(r"([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}", text):
        raise DescriptionError(f'{what}: mac is six bytes as "02:00:00:00:00:01", in quotes, got {text!r}')
    mac = int(text.replace(":", ""), 16)
    if mac >> 40 & 1 or mac == 0:
        raise DescriptionError(f"{what}: mac {text} is of a group or of nobody, not of one host")
    return mac
