"""What every host does in a probe: it obeys the coordinator, and exchanges bytes with the others."""

import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from trainkit.collectives._address import endpoint
from trainkit.collectives._probe._streams import Together, echo, hops, receive_rate, round_trips, send_until
from trainkit.collectives._probe._wire import (
    STRANGER_S,
    Gone,
    ProbeError,
    Strangers,
    accept_channel,
    number,
    open_channel,
    shut,
    whole,
)

_IDLE_S = 300.0  # longest silence of a coordinator that thinks
_MOST_FLOWS = 1024
_MOST_WINDOW_S = 60.0


@dataclass(frozen=True)
class _Host:
    name: str
    address: str
    port: int


class Agent:
    """One host of a probe."""

    def __init__(
        self,
        coordinator: tuple[str, int],
        key: bytes,
        about: Mapping[str, Any],
        timeout_s: float,
        join_s: float,
        source: str = "",
    ) -> None:
        """Join the probe.

        Args:
            coordinator: address of the coordinator.
            key: secret of the probe.
            about: what the coordinator is told: "name", "rank" (or None), "devices".
            timeout_s: longest wait for another host.
            join_s: longest wait for the coordinator to be there, and then for the other hosts to come.
            source: own address to use; empty: the one that the route to the coordinator has.

        Raises:
            ProbeError: the coordinator cannot be reached in time, or has another key.
        """
        self._timeout_s, self._join_s = timeout_s, join_s
        self._name = str(about.get("name"))
        connection = _reach(coordinator, join_s, source)
        own = connection.getsockname()[0]
        self._listener = socket.create_server((own, 0), family=connection.family, backlog=256)
        hello = {**about, "port": self._listener.getsockname()[1]}
        try:
            self._control, _ = open_channel(connection, key, hello, timeout_s)
        except Gone as error:
            shut(self._listener)
            connection.close()
            where = endpoint(*coordinator)
            raise ProbeError(f"the coordinator at {where} did not admit host {self._name!r}: {error}") from None
        self._session = b""
        self._hosts: list[_Host] = []
        self._you = -1
        self._arrived: dict[tuple[int, int, int], socket.socket] = {}
        self._news = threading.Condition()
        self._open = True
        self._strangers = Strangers()

    def run(self) -> dict[str, Any]:
        """Do what the coordinator says until it has the result.

        Returns:
            The network as a dictionary.

        Raises:
            ProbeError: a host failed: which and why.
        """
        try:
            self._enrol(self._control.receive(self._join_s + _IDLE_S))
            threading.Thread(target=self._welcome, daemon=True).start()
            while True:
                message = self._control.receive(_IDLE_S)
                do = message.get("do")
                if do == "done" and isinstance(message.get("network"), dict):
                    return dict(message["network"])
                if do == "abort":
                    raise ProbeError(str(message.get("reason"))[:2000])
                try:
                    reply = {"ping": self._ping, "load": self._load}.get(str(do), self._unknown)(message)
                except (OSError, Gone) as error:
                    reply = {"failed": str(error)}
                self._control.send(reply, self._timeout_s)
        except Gone as error:
            raise ProbeError(f"the coordinator left the probe: {error}") from None
        finally:
            self.close()

    def close(self) -> None:
        """Leave."""
        self._open = False
        self._control.close()
        shut(self._listener)
        with self._news:
            for connection in self._arrived.values():
                connection.close()
            self._arrived.clear()

    def _enrol(self, message: Mapping[str, Any]) -> None:
        if message.get("do") == "abort":
            raise ProbeError(str(message.get("reason"))[:2000])
        try:
            self._session = bytes.fromhex(message["session"])
            self._hosts = [_Host(str(name), str(address), int(port)) for name, address, port in message["hosts"]]
        except (KeyError, TypeError, ValueError):
            raise Gone("its list of hosts makes no sense") from None
        self._you = whole(message, "you", 0, len(self._hosts) - 1)

    def _welcome(self) -> None:
        """Let the other hosts in; each in a thread of its own, so that a silent one keeps nobody waiting."""
        while self._open:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._admit, args=(connection,), daemon=True).start()

    def _admit(self, connection: socket.socket) -> None:
        try:
            with self._strangers.admitted(connection):
                shy_s = min(STRANGER_S, self._timeout_s)
                _, hello = accept_channel(connection, self._session, {"hops": hops(connection)}, shy_s)
            sender = whole(hello, "from", 0, len(self._hosts) - 1)
            turn, part = whole(hello, "round", 0, 1 << 30), whole(hello, "part", 0, _MOST_FLOWS)
        except (Gone, OSError):
            connection.close()
            return
        if hello.get("what") == "ping":
            echo(connection, self._timeout_s)
            return
        with self._news:
            if self._open:
                self._arrived[turn, sender, part] = connection
                self._news.notify_all()
            else:
                connection.close()

    def _connect(self, to: int, hello: Mapping[str, Any]) -> tuple[socket.socket, dict[str, Any]]:
        host = self._hosts[to]
        try:
            bound = (self._listener.getsockname()[0], 0)
            connection = socket.create_connection((host.address, host.port), self._timeout_s, bound)
            _, answer = open_channel(connection, self._session, {**hello, "from": self._you}, self._timeout_s)
        except (OSError, Gone) as error:
            raise Gone(
                f"it could not reach host {host.name!r} at {endpoint(host.address, host.port)}: {error}"
            ) from None
        return connection, answer

    def _ping(self, message: Mapping[str, Any]) -> dict[str, Any]:
        to = whole(message, "to", 0, len(self._hosts) - 1)
        connection, answer = self._connect(to, {"what": "ping", "round": 0, "part": 0})
        with connection:
            times = round_trips(connection, whole(message, "count", 1, 10_000), self._timeout_s)
        return {"least": min(times), "median": sorted(times)[len(times) // 2], "hops": answer.get("hops")}

    def _load(self, message: Mapping[str, Any]) -> dict[str, Any]:
        turn, streams = whole(message, "round", 0, 1 << 30), whole(message, "streams", 1, 64)
        warm, measure = (number(message, key, 0, _MOST_WINDOW_S) for key in ("warm", "measure"))
        outgoing: list[socket.socket] = []
        incoming: list[tuple[int, socket.socket]] = []
        try:
            for to in self._listed(message, "to"):
                for part in range(streams):
                    outgoing.append(self._connect(to, {"what": "load", "round": turn, "part": part})[0])
            end = time.monotonic() + self._timeout_s
            for sender in self._listed(message, "from"):
                for part in range(streams):
                    incoming.append((sender, self._awaited((turn, sender, part), end)))
            self._control.send({"ready": turn}, self._timeout_s)
            if self._control.receive(_IDLE_S).get("do") != "go":
                raise Gone("the round was called off")
            start = time.monotonic()
            together = Together()
            for _, connection in incoming:
                together.start(receive_rate, connection, start + warm, start + warm + measure)
            for connection in outgoing:
                # A little longer than is measured, so that no receiver sees another's flow end early.
                together.start(send_until, connection, start + warm + 1.1 * measure)
            rates = together.join(warm + measure + self._timeout_s)
        finally:
            for connection in [*outgoing, *(connection for _, connection in incoming)]:
                connection.close()
        total: dict[str, float] = {}
        for (sender, _), rate in zip(incoming, rates, strict=False):
            total[str(sender)] = total.get(str(sender), 0.0) + rate
        return {"rates": total}

    def _listed(self, message: Mapping[str, Any], key: str) -> list[int]:
        listed = message.get(key)
        if not isinstance(listed, list) or len(listed) > _MOST_FLOWS:
            raise Gone(f"{key} must be a list of at most {_MOST_FLOWS} hosts")
        return [whole({key: one}, key, 0, len(self._hosts) - 1) for one in listed]

    def _awaited(self, which: tuple[int, int, int], end: float) -> socket.socket:
        with self._news:
            while which not in self._arrived:
                if not self._news.wait(max(0.0, end - time.monotonic())) and which not in self._arrived:
                    raise Gone(
                        f"host {self._hosts[which[1]].name!r} did not connect to it within {self._timeout_s:g} s"
                    )
            return self._arrived.pop(which)

    @staticmethod
    def _unknown(message: Mapping[str, Any]) -> dict[str, Any]:
        raise Gone(f"it does not know how to {str(message.get('do'))[:40]!r}: do all hosts have the same version?")


def _reach(coordinator: tuple[str, int], join_s: float, source: str) -> socket.socket:
    """Connect, again and again while the coordinator is not there yet."""
    end = time.monotonic() + join_s
    while True:
        try:
            return socket.create_connection(
                coordinator, max(0.1, end - time.monotonic()), (source, 0) if source else None
            )
        except OSError as error:
            if time.monotonic() + 0.1 >= end:
                where = endpoint(*coordinator)
                raise ProbeError(
                    f"the coordinator at {where} could not be reached within {join_s:g} s ({error}): "
                    "is the first host started, and is that its address?"
                ) from None
            time.sleep(0.1)
