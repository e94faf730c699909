"""The network: compute nodes, switches, and what each directed link carries."""

import json
import math
import re
from collections import deque
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trainkit._files import write_text_atomically
from trainkit.collectives.schedule._units import check_unit

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from networkx import DiGraph

Ints = npt.NDArray[np.int64]
_KEYS = ("name", "nodes", "compute_nodes", "links")
_OPTIONAL = ("unit", "latency", "multicast", "aggregate", "confidence", "devices")
_KINDS: dict[str, tuple[type, str]] = {
    **dict.fromkeys(("nodes", "compute_nodes", "links"), (Sequence, "a list")),
    **dict.fromkeys(("multicast", "aggregate"), (Collection, "a list of switches")),
    **dict.fromkeys(("latency", "confidence", "devices"), (Mapping, "an object")),
}
_LARGEST = 2**53
_EXPONENT, _MOST_DIGITS = re.compile(r"[eE]([+-]?\d{1,18})\s*$"), 99


class TopologyError(ValueError):
    """A network description that breaks a rule."""


@dataclass(frozen=True)
class Topology:
    """A directed network of compute nodes and switches.

    Capacities are exact: positive integers or decimal strings. Every Fraction that the engine returns is in this
    network's own unit of capacity.

    Example:
        >>> square = [("a", "b"), ("b", "c"), ("c", "d"), ("d", "a")]
        >>> nodes = ["a", "b", "c", "d"]
        >>> ring = Topology("ring", nodes, nodes, [(u, v, 1) for u, v in square])
        >>> ring.links[0]
        ('a', 'b', Fraction(1, 1))
    """

    name: str
    """What people call it."""
    nodes: Sequence[str]
    """All vertices; those that are not compute nodes are switches."""
    compute_nodes: Sequence[str]
    """The vertices that hold data; their order is the order of ranks."""
    links: Sequence[tuple[str, str, Any]]
    """(from, to, capacity); equal pairs are parallel links and add up. Kept as Fractions."""
    unit: str | None = None
    """Unit of capacity: "B/s", "GB/s", "Gbit/s" or "Mbit/s"."""
    latency: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """Link -> seconds."""
    multicast: frozenset[str] = frozenset()
    """Switches that can send one incoming message out of several ports (NVLS, SHARP, a P4 switch)."""
    aggregate: frozenset[str] = frozenset()
    """Switches that can add up incoming messages."""
    confidence: Mapping[str, Any] = field(default_factory=dict)
    """How well each figure is known, as whoever measured it says; carried along."""
    devices: Mapping[str, Any] = field(default_factory=dict)
    """Addresses or device names of nodes; carried along."""

    def __post_init__(self) -> None:
        """Check every rule, so that nothing later has to."""
        for key, (kind, what) in _KINDS.items():
            if not isinstance(getattr(self, key), kind) or isinstance(getattr(self, key), str):
                raise TopologyError(f"{key} must be {what}, got {getattr(self, key)!r}")
        if not isinstance(self.name, str):
            raise TopologyError(f"the name of a network is text, got {self.name!r}")
        for key in ("nodes", "compute_nodes"):
            names = tuple(getattr(self, key))
            object.__setattr__(self, key, names)
            wrong = [name for name in names if not isinstance(name, str) or not name]
            if wrong:
                raise TopologyError(f"{key} must be non-empty names (strings), got {wrong[0]!r}")
            if len(set(names)) < len(names):
                twice = next(name for name in names if names.count(name) > 1)
                raise TopologyError(f"{key} must be named once each, {twice!r} appears {names.count(twice)} times")
        known = set(self.nodes)
        for name in self.compute_nodes:
            if name not in known:
                raise TopologyError(f"compute node {name!r} is not among the nodes: add it there")
        if len(self.compute_nodes) < 2:
            raise TopologyError(f"a collective needs at least 2 compute nodes, got {len(self.compute_nodes)}")
        object.__setattr__(self, "links", self._merged(known))
        check_unit(self.unit)
        for key in ("multicast", "aggregate"):
            chosen = list(getattr(self, key))
            for name in chosen:
                if not isinstance(name, str) or name not in known or name in self.compute_nodes:
                    raise TopologyError(
                        f"{key} names switches, {name!r} is {'a compute node' if name in self.compute_nodes else 'unknown'}"
                    )
            object.__setattr__(self, key, frozenset(chosen))
        pairs = {(u, v) for u, v, _ in self.links}
        for link, delay in self.latency.items():
            if link not in pairs:
                raise TopologyError(f"latency names links, {link[0]!r} -> {link[1]!r} is none")
            if isinstance(delay, bool) or not isinstance(delay, int | float) or not 0 <= delay < math.inf:
                raise TopologyError(f"latency of {link[0]} -> {link[1]} must be seconds >= 0, got {delay!r}")
        self._check_connected()

    def _merged(self, known: set[str]) -> tuple[tuple[str, str, Fraction], ...]:
        total: dict[tuple[str, str], Fraction] = {}
        for link in self.links:
            if not isinstance(link, Sequence) or isinstance(link, str) or len(link) != 3:
                raise TopologyError(f"a link is [from, to, capacity], got {link!r}")
            u, v, capacity = link
            for name in (u, v):
                if not isinstance(name, str) or name not in known:
                    raise TopologyError(f"link {u!r} -> {v!r} names {name!r}, which is not among the nodes")
            if u == v:
                raise TopologyError(f"link {u!r} -> {v!r} is a self-loop: leave it out, it carries nothing")
            total[u, v] = total.get((u, v), Fraction(0)) + _capacity(capacity, f"link {u!r} -> {v!r}")
        merged = tuple((u, v, capacity) for (u, v), capacity in total.items())
        scale = math.lcm(*(capacity.denominator for _, _, capacity in merged))
        if max((capacity for _, _, capacity in merged), default=Fraction(0)) * scale > _LARGEST:
            raise TopologyError("a capacity needs more than 53 bits once scaled to integers: give it in a coarser unit")
        return merged

    def _check_connected(self) -> None:
        for way, words in ((0, "in-links"), (1, "out-links")):
            ends = {link[1 - way] for link in self.links}
            for name in self.compute_nodes:
                if name not in ends:
                    raise TopologyError(f"compute node {name!r} has no {words}: no collective can include it")
        first = self.compute_nodes[0]
        for way, words in ((0, "cannot be reached from"), (1, "cannot reach")):
            near: dict[str, list[str]] = {}
            for link in self.links:
                near.setdefault(link[way], []).append(link[1 - way])
            seen, queue = {first}, deque([first])
            while queue:
                for other in near.get(queue.popleft(), ()):
                    if other not in seen:
                        seen.add(other)
                        queue.append(other)
            lost = next((name for name in self.compute_nodes if name not in seen), None)
            if lost is not None:
                raise TopologyError(f"the network is disconnected: compute node {lost!r} {words} {first!r}")

    @classmethod
    def load(cls, path: str | Path) -> "Topology":
        """Read a JSON file of the form of `from_dict`.

        Raises:
            TopologyError: it is not JSON, names a key twice, or breaks a rule.
        """
        try:
            data = json.loads(Path(path).read_text(), parse_float=_Written, object_pairs_hook=_once)
        except TopologyError:
            raise
        except ValueError as error:  # not JSON, not text, or a number of thousands of digits
            raise TopologyError(f"{path} is not JSON: {error}") from None
        except RecursionError:
            raise TopologyError(
                f"{path} is no network: it is nested too deep, a network is an object of lists"
            ) from None
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Topology":
        """The network behind `{"name", "nodes", "compute_nodes", "links": [[from, to, capacity], ...]}`.

        Optional keys: "unit", "latency" ({"u->v": seconds}), "multicast", "aggregate", "confidence", "devices".

        Raises:
            TopologyError: a key is unknown or missing, or a value breaks a rule.
        """
        if not isinstance(data, Mapping):
            raise TopologyError(f"a network is an object with the keys {', '.join(_KEYS)}, got {type(data).__name__}")
        unknown = [key for key in data if key not in _KEYS + _OPTIONAL]
        if unknown:
            raise TopologyError(
                f"unknown key {unknown[0]!r}: a network has {', '.join(_KEYS)} and may have {', '.join(_OPTIONAL)}"
            )
        missing = [key for key in _KEYS if key not in data]
        if missing:
            raise TopologyError(f"key {missing[0]!r} is missing: a network has {', '.join(_KEYS)}")
        options = {key: data[key] for key in _OPTIONAL if key in data and key != "latency"}
        latency: Any = data.get("latency", {})
        if isinstance(latency, Mapping):
            latency = dict(map(_delay, latency.items()))
        return cls(data["name"], data["nodes"], data["compute_nodes"], data["links"], latency=latency, **options)

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads; capacities are ints, or decimal strings where they are not whole."""
        data: dict[str, Any] = {
            "name": self.name,
            "nodes": list(self.nodes),
            "compute_nodes": list(self.compute_nodes),
            "links": [[u, v, _written(capacity)] for u, v, capacity in self.links],
        }
        if self.unit is not None:
            data["unit"] = self.unit
        if self.latency:
            data["latency"] = {f"{u}->{v}": delay for (u, v), delay in self.latency.items()}
        for key in ("multicast", "aggregate"):
            if getattr(self, key):
                data[key] = sorted(getattr(self, key))
        for key in ("confidence", "devices"):
            if getattr(self, key):
                data[key] = dict(getattr(self, key))
        return data

    def save(self, path: str | Path) -> None:
        """Write `to_dict` as JSON; an existing file is replaced only by a whole one."""
        write_text_atomically(Path(path), json.dumps(self.to_dict(), indent=1) + "\n")

    @property
    def switches(self) -> tuple[str, ...]:
        """The vertices that are no compute nodes."""
        compute = set(self.compute_nodes)
        return tuple(name for name in self.nodes if name not in compute)

    @cached_property
    def index(self) -> dict[str, int]:
        """Name -> number of the vertex."""
        return {name: number for number, name in enumerate(self.nodes)}

    @cached_property
    def compute(self) -> Ints:
        """Vertex numbers of the compute nodes, in rank order."""
        return np.array([self.index[name] for name in self.compute_nodes], dtype=np.int64)

    @cached_property
    def scale(self) -> int:
        """What capacities are multiplied by to be integers."""
        return math.lcm(*(capacity.denominator for _, _, capacity in self.links))

    @cached_property
    def arcs(self) -> tuple[Ints, Ints, Ints]:
        """(from, to, capacity * scale) of every link."""
        index, scale = self.index, self.scale
        rows = [(index[u], index[v], int(capacity * scale)) for u, v, capacity in self.links]
        tail, head, capacity = np.array(rows, dtype=np.int64).T.copy()
        return tail, head, capacity

    @cached_property
    def balanced(self) -> bool:
        """Whether every switch takes in as much as it gives out."""
        tail, head, capacity = self.arcs
        surplus = np.zeros(len(self.nodes), dtype=np.int64)
        np.add.at(surplus, head, capacity)
        np.subtract.at(surplus, tail, capacity)
        surplus[self.compute] = 0
        return not surplus.any()

    def transposed(self) -> "Topology":
        """Every link turned round; switches that add now copy."""
        return replace(
            self,
            links=[(v, u, capacity) for u, v, capacity in self.links],
            latency={(v, u): delay for (u, v), delay in self.latency.items()},
            multicast=self.aggregate,
            aggregate=self.multicast,
        )

    def with_links(self, change: Mapping[tuple[str, str], Any]) -> "Topology":
        """A copy in which the named links have another capacity; None takes a link out."""
        pairs = {(u, v) for u, v, _ in self.links}
        for link in change:
            if link not in pairs:
                raise TopologyError(f"{link[0]!r} -> {link[1]!r} is not a link of {self.name}")
        links = [(u, v, change.get((u, v), capacity)) for u, v, capacity in self.links]
        gone = {link for link, capacity in change.items() if capacity is None}
        latency = {link: delay for link, delay in self.latency.items() if link not in gone}
        return replace(self, links=[link for link in links if link[2] is not None], latency=latency)

    def to_networkx(self) -> "DiGraph":
        """The network as a DiGraph: attribute `compute` on nodes, `capacity` (Fraction) on edges."""
        import networkx

        graph = networkx.DiGraph(name=self.name)
        compute = set(self.compute_nodes)
        graph.add_nodes_from((name, {"compute": name in compute}) for name in self.nodes)
        graph.add_edges_from((u, v, {"capacity": capacity}) for u, v, capacity in self.links)
        return graph

    def draw(self) -> "Figure":
        """Compute nodes as circles, switches as squares, links by capacity."""
        from trainkit.collectives._draw import draw_topology

        return draw_topology(self)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object each of whose keys is there once: the last of several would win in silence."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise TopologyError(f"key {key!r} is there twice in one object: leave one out")
        found[key] = value
    return found


def _delay(item: tuple[str, Any]) -> tuple[tuple[str, ...], Any]:
    link, delay = item
    ends = tuple(link.split("->"))
    if len(ends) != 2:
        raise TopologyError(f'latency is keyed by "from->to", got {link!r}')
    try:
        return ends, float(delay) if isinstance(delay, str) else delay
    except ValueError:
        raise TopologyError(f"latency of {link} must be seconds >= 0, got {delay!r}") from None


class _Written(float):
    """A number of a file with the digits it was written in."""

    def __new__(cls, text: str) -> "_Written":
        number = super().__new__(cls, text)
        number.text = text
        return number

    text: str


def _capacity(value: Any, what: str) -> Fraction:
    if isinstance(value, _Written):
        value = value.text
    if isinstance(value, bool) or not isinstance(value, int | str | Fraction):
        raise TopologyError(
            f'{what}: capacity must be a whole number or a decimal string such as "12.5", got {value!r}'
        )
    # Fractions write powers of ten out in full: one of a billion digits would never end.
    if isinstance(value, str) and abs(int((_EXPONENT.search(value) or ["", "0"])[1])) > _MOST_DIGITS:
        raise TopologyError(f"{what}: capacity {value} leaves 53 bits: give it in a coarser unit")
    try:
        capacity = Fraction(value)
    except (ValueError, ZeroDivisionError):
        raise TopologyError(
            f'{what}: capacity must be a whole number or a decimal string such as "12.5", got {value!r}'
        ) from None
    if capacity <= 0:
        raise TopologyError(f"{what}: capacity must be positive, got {value}: leave a dead link out")
    return capacity


def _written(capacity: Fraction) -> int | str:
    if capacity.denominator == 1:
        return int(capacity)
    digits = 0
    while (capacity * 10**digits).denominator > 1:
        digits += 1
        if digits > 18:
            raise TopologyError(f"capacity {capacity} has no finite decimal form")
    whole = str(int(capacity * 10**digits)).rjust(digits + 1, "0")
    return f"{whole[:-digits]}.{whole[-digits:]}"


def capacities(topology: Topology) -> dict[tuple[str, str], Fraction]:
    """Link -> capacity."""
    return {(u, v): capacity for u, v, capacity in topology.links}


def names(topology: Topology, vertices: Iterable[int]) -> tuple[str, ...]:
    """Names of vertex numbers."""
    return tuple(topology.nodes[v] for v in vertices)
