"""The host that leads a probe: it collects the others, runs the rounds and names whoever fails."""

import contextlib
import queue
import re
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainkit.collectives._probe._rounds import PINGS, Pair
from trainkit.collectives._probe._tree import Flows
from trainkit.collectives._probe._wire import (
    STRANGER_S,
    Channel,
    Gone,
    ProbeError,
    Strangers,
    accept_channel,
    number,
    shut,
    whole,
)

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how many rounds are done and how many there are."""

NAME = re.compile(r"[\w.:-]{1,200}")
"""What a host may be called."""
_LAST_WORDS_S = 2.0


@dataclass
class Member:
    """A host that takes part."""

    channel: Channel
    name: str
    address: str
    port: int
    devices: dict[str, Any]


@dataclass
class RoundTrips:
    """What pairs of hosts said of their idle round trips: [N, N] lists, upper half filled."""

    least_s: dict[Pair, float] = field(default_factory=dict)
    """Shortest round trip, seconds."""
    hops: dict[Pair, int] = field(default_factory=dict)
    """Routers between the two, where the system told."""


class Coordinator:
    """Leads the hosts of one probe."""

    def __init__(self, listener: socket.socket, key: bytes, timeout_s: float, streams: int = 1) -> None:
        """Take over a listening socket.

        Args:
            listener: where the hosts come.
            key: secret of the probe.
            timeout_s: longest wait for a host beyond what its work takes.
            streams: TCP connections of a flow.
        """
        self._listener, self._key, self._timeout_s, self._streams = listener, key, timeout_s, streams
        self.members: list[Member] = []
        self._came: list[tuple[int | None, Member]] = []
        self._news = threading.Condition()
        self._inbox: queue.Queue[tuple[int, dict[str, Any] | Gone]] = queue.Queue()
        self._turn = 0
        self._strangers = Strangers()

    def collect(self, hosts: int, join_s: float) -> None:
        """Let `hosts` hosts in and tell each who the others are.

        A host that says its rank gets it, the others fill the gaps as they come.

        Args:
            hosts: how many.
            join_s: longest wait for all.

        Raises:
            ProbeError: they did not all come in time; names those that did.
        """
        threading.Thread(target=self._welcome, args=(hosts,), daemon=True).start()
        with self._news:
            complete = self._news.wait_for(lambda: len(self._came) == hosts, join_s)
            came = list(self._came)
        self.members = [member for _, member in came]  # who is to be told, also if their ranks make no sense
        if not complete:
            names = ", ".join(member.name for member in self.members) or "none"
            raise ProbeError(f"{len(came)} of {hosts} hosts came within {join_s:g} s: {names}")
        shut(self._listener)
        self.members = _numbered(came, hosts)
        session = secrets.token_hex(32)
        listed = [[member.name, member.address, member.port] for member in self.members]
        for number_, member in enumerate(self.members):
            self._tell(number_, {"do": "roster", "session": session, "you": number_, "hosts": listed})
            threading.Thread(target=self._listen, args=(number_, member.channel), daemon=True).start()

    def ping(self, pairs: Sequence[Pair], into: RoundTrips) -> None:
        """Idle round trips of disjoint pairs, both ends of a pair once."""
        asked = {u: {"do": "ping", "to": v, "count": PINGS} for u, v in pairs}
        for (u, v), reply in zip(pairs, self._ask(asked, "a round of round trips").values(), strict=True):
            with self._blamed(u):
                into.least_s[u, v] = number(reply, "least", 0, 1e4)
                if reply.get("hops") is not None:
                    into.hops[u, v] = whole(reply, "hops", 0, 255)

    def load(self, flows: Sequence[Pair], warm_s: float, measure_s: float) -> Flows:
        """Run flows at the same time.

        Returns:
            The flows with what each got.
        """
        self._turn += 1
        asked: dict[int, dict[str, Any]] = {}
        for at, other in [(u, ("to", v)) for u, v in flows] + [(v, ("from", u)) for u, v in flows]:
            common = {"do": "load", "round": self._turn, "warm": warm_s, "measure": measure_s, "streams": self._streams}
            asked.setdefault(at, {**common, "to": [], "from": []})[other[0]].append(other[1])
        self._ask(asked, "the start of a load round")
        window = warm_s + 1.1 * measure_s
        replies = self._ask({at: {"do": "go"} for at in asked}, "a load round", window)
        measured = []
        for u, v in flows:
            with self._blamed(v):
                rates = replies[v].get("rates")
                measured.append((u, v, number(rates if isinstance(rates, dict) else {}, str(u), 0, 1e14)))
        return Flows.of(measured)

    def finish(self, network: Mapping[str, Any]) -> None:
        """Give every host the result and let them go."""
        for number_ in range(len(self.members)):
            self._tell(number_, {"do": "done", "network": dict(network)})

    def abort(self, reason: str) -> None:
        """Tell every host that can still hear it why there will be no result."""
        for member in self.members:
            with contextlib.suppress(Gone):
                member.channel.send({"do": "abort", "reason": reason}, 1.0)

    def close(self) -> None:
        """Close all connections."""
        shut(self._listener)
        with self._news:
            for _, member in self._came:
                member.channel.close()

    def _welcome(self, hosts: int) -> None:
        """Take in who comes; each in a thread of its own, so that a silent stranger keeps nobody waiting."""
        while True:
            try:
                connection, (address, *_) = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._admit, args=(connection, address, hosts), daemon=True).start()

    def _admit(self, connection: socket.socket, address: str, hosts: int) -> None:
        try:
            with self._strangers.admitted(connection):
                channel, hello = accept_channel(connection, self._key, {}, min(STRANGER_S, self._timeout_s))
            rank = None if hello.get("rank") is None else whole(hello, "rank", 0, 1 << 20)
            name, devices = hello.get("name"), hello.get("devices")
            if not isinstance(name, str) or not NAME.fullmatch(name) or not isinstance(devices, dict):
                raise Gone("a host must say its name and devices")
            member = Member(channel, name, address, whole(hello, "port", 1, 65535), devices)
            with self._news:
                full = len(self._came) == hosts
                if not full:
                    self._came.append((rank, member))
                    self._news.notify_all()
            if full:
                reason = (
                    f"host {name!r} came after the {hosts} that this probe is for: give each the true number of hosts"
                )
                channel.send({"do": "abort", "reason": reason}, self._timeout_s)
                connection.close()
        except (Gone, OSError):  # a stranger, or a host with another key: it may try again
            connection.close()

    def _listen(self, number_: int, channel: Channel) -> None:
        while True:
            try:
                self._inbox.put((number_, channel.receive(1e6)))
            except Gone as error:
                self._inbox.put((number_, error))
                return

    def _tell(self, number_: int, message: Mapping[str, Any]) -> None:
        with self._blamed(number_):
            self.members[number_].channel.send(message, self._timeout_s)

    def _ask(
        self, messages: Mapping[int, Mapping[str, Any]], what: str, takes_s: float = 0.0
    ) -> dict[int, dict[str, Any]]:
        """Send each host its message; their replies in the order of `messages`."""
        for number_, message in messages.items():
            self._tell(number_, message)
        replies: dict[int, dict[str, Any]] = {}
        end = time.monotonic() + takes_s + 2 * self._timeout_s
        complaint: tuple[int, str] | None = None
        while len(replies) < len(messages):
            try:
                number_, reply = self._inbox.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                if complaint is not None:
                    raise ProbeError(f"{self._called(complaint[0])} says: {complaint[1]}") from None
                late = [self._called(n) for n in messages if n not in replies]
                more = f" and {len(late) - 3} more" if len(late) > 3 else ""
                raise ProbeError(f"{', '.join(late[:3])}{more} did not answer in time during {what}") from None
            if isinstance(reply, Gone):
                raise ProbeError(f"{self._called(number_)} failed during {what}: {reply}")
            if "failed" in reply and complaint is None:
                # Whoever it could not reach may be dying just now: that one is then to be named.
                complaint = (number_, str(reply["failed"])[:500])
                end = min(end, time.monotonic() + _LAST_WORDS_S)
            replies.setdefault(number_, reply)
        if complaint is not None:
            with contextlib.suppress(queue.Empty):
                number_, last = self._inbox.get(timeout=_LAST_WORDS_S)
                if isinstance(last, Gone):
                    raise ProbeError(f"{self._called(number_)} failed during {what}: {last}")
            raise ProbeError(f"{self._called(complaint[0])} says: {complaint[1]}")
        return {number_: replies[number_] for number_ in messages}

    def _called(self, number_: int) -> str:
        member = self.members[number_]
        return f"host {member.name!r} ({member.address})"

    @contextlib.contextmanager
    def _blamed(self, number_: int) -> Iterator[None]:
        try:
            yield
        except Gone as error:
            raise ProbeError(f"{self._called(number_)} failed: {error}") from None


def _numbered(came: Sequence[tuple[int | None, Member]], hosts: int) -> list[Member]:
    """Members by rank; those without one fill the gaps as they came."""
    by_rank: dict[int, Member] = {}
    for rank, member in came:
        if rank is not None:
            if rank >= hosts:
                raise ProbeError(f"host {member.name!r} has rank {rank}, ranks go from 0 to {hosts - 1}")
            if rank in by_rank:
                raise ProbeError(f"hosts {by_rank[rank].name!r} and {member.name!r} both have rank {rank}")
            by_rank[rank] = member
    free = iter([rank for rank in range(hosts) if rank not in by_rank])
    for rank, member in came:
        if rank is None:
            by_rank[next(free)] = member
    members = [by_rank[rank] for rank in range(hosts)]
    names = [member.name for member in members]
    for rank, member in enumerate(members):
        if names.count(member.name) > 1:
            member.name = f"{member.name}-{rank}"
    return members
