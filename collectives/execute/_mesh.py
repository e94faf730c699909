"""One TCP connection per directed pair of ranks, each end sure whom it talks to."""

import hmac
import secrets
import selectors
import socket
import struct
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta

from trainkit.collectives._address import endpoint, family
from trainkit.collectives._exchange import Store
from trainkit.collectives.execute._errors import PeerLost
from trainkit.collectives.execute._verdict import Verdict

_HELLO = struct.Struct("<8s16sII")  # name and version of the protocol, session key, sender's rank, receiver's rank
_NAME = b"trainkt2"
_KEY = 32
_SHY_S = 2.0
"""Seconds that a caller may take to say hello."""
_MOST_CALLERS = 256
"""Callers that are listened to at the same time; of more, who has been silent longest goes."""
_LOOK_S = 0.5  # between looks at what another rank has written down
_TCP_NOTSENT_LOWAT = 25
UNSENT = 1 << 17
"""Bytes that a connection takes in before they are on their way; nothing more urgent overtakes them."""


@dataclass
class _Caller:
    """Somebody who connected and has not said who he is."""

    socket: socket.socket
    until: float
    said: bytes = b""


@dataclass
class Mesh:
    """This rank's end of the connections; more are made when a schedule needs them.

    Args:
        store: shared by the ranks and by nobody else.
        rank: this rank.
        address: address that the others reach this rank at; only it is listened on.
        timeout_s: seconds for the ranks to meet.
    """

    store: Store
    rank: int
    address: str
    timeout_s: float
    connected: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Listen, and say where."""
        if self.rank == 0:
            self.store.set("key", secrets.token_hex(_KEY))
        self._verdict = Verdict(self.store, self.rank)
        self._early: dict[int, socket.socket] = {}
        self._callers: dict[int, _Caller] = {}
        self._listener = socket.create_server((self.address, 0), family=family(self.address), backlog=1024)
        self._listener.setblocking(False)
        self.store.set(f"address/{self.rank}", endpoint(self.address, self._listener.getsockname()[1]))
        self._key: bytes | None = None

    def connect(self, peers: Iterable[int]) -> list[tuple[int, int, int]]:
        """Connect to those of `peers` that this rank is not connected to; they must do the same.

        Returns:
            (rank, file descriptor that its data comes on, file descriptor that ours goes on), now the caller's.

        Raises:
            PeerLost: a rank does not come within the time-out.
        """
        wanted = sorted(set(peers) - self.connected)
        until = time.monotonic() + self.timeout_s
        if self._key is None and wanted:
            self._key = bytes.fromhex(self._told("key", 0, until))
        outgoing: dict[int, socket.socket] = {}
        comes: dict[int, socket.socket] = {}
        try:
            for peer in wanted:
                outgoing[peer] = self._call(peer, until)
            self._meet(outgoing, comes, until)
        except BaseException:
            for one in (*outgoing.values(), *comes.values()):
                one.close()
            raise
        self.connected.update(wanted)
        return [(peer, _hand_over(comes[peer]), _hand_over(outgoing[peer])) for peer in wanted]

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()
        for one in (*self._early.values(), *(caller.socket for caller in self._callers.values())):
            one.close()

    def _call(self, peer: int, until: float) -> socket.socket:
        assert self._key is not None
        host, port = self._told(f"address/{peer}", peer, until).rsplit(":", 1)
        try:
            made = socket.create_connection(
                (host.strip("[]"), int(port)), _left(until), source_address=(self.address, 0)
            )
        except TimeoutError as error:
            raise self._missing(peer) from error
        except OSError as error:
            raise PeerLost(
                f"rank {peer} cannot be reached at {host}:{port} from {self.address} ({error.strerror}): "
                "check the route, or name the interface with interface= or GLOO_SOCKET_IFNAME",
                peer,
            ) from error
        made.sendall(_HELLO.pack(_NAME, self._key[:16], self.rank, peer))
        return made

    def _told(self, key: str, peer: int, until: float) -> str:
        """What `peer` has put into the store."""
        while True:
            self._heed()
            try:
                self.store.wait([key], timedelta(seconds=min(_left(until), _LOOK_S)))
                return self.store.get(key).decode()
            except RuntimeError as error:
                if time.monotonic() >= until:
                    raise self._missing(peer) from error

    def _heed(self) -> None:
        """Another rank may have given up already."""
        told = self._verdict.read()
        if told is not None:
            raise told

    def _meet(self, outgoing: dict[int, socket.socket], comes: dict[int, socket.socket], until: float) -> None:
        """Hear everybody at once: who calls, and the answers of those that were called.

        A stranger, silent or noisy, costs nobody else any time.
        """
        answers = dict.fromkeys(outgoing, b"")
        look = 0.0
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ)
            for caller in self._callers.values():
                selector.register(caller.socket, selectors.EVENT_READ, caller)
            for peer, one in outgoing.items():
                one.setblocking(False)
                selector.register(one, selectors.EVENT_READ, peer)
            while True:
                for peer in [peer for peer in outgoing if peer not in comes and peer in self._early]:
                    comes[peer] = self._early.pop(peer)
                now = time.monotonic()
                silent = [peer for peer in outgoing if peer not in comes or len(answers[peer]) < _KEY - 16]
                if not silent:
                    return
                if now >= until:
                    raise self._missing(silent[0])
                if now >= look:
                    self._heed()
                    look = now + _LOOK_S
                for caller in [caller for caller in self._callers.values() if caller.until < now]:
                    self._dismiss(caller, selector)
                for key, _ in selector.select(min(_left(until), _LOOK_S)):
                    if key.fileobj is self._listener:
                        self._accept(selector)
                    elif isinstance(key.data, _Caller):
                        self._listen_to(key.data, selector)
                    else:
                        self._hear_answer(key.data, outgoing[key.data], answers, selector)

    def _accept(self, selector: selectors.BaseSelector) -> None:
        with suppress(OSError):
            one, _ = self._listener.accept()
            one.setblocking(False)
            if len(self._callers) >= _MOST_CALLERS:
                self._dismiss(min(self._callers.values(), key=lambda caller: caller.until), selector)
            caller = self._callers[one.fileno()] = _Caller(one, time.monotonic() + _SHY_S)
            selector.register(one, selectors.EVENT_READ, caller)

    def _listen_to(self, caller: _Caller, selector: selectors.BaseSelector) -> None:
        assert self._key is not None
        try:
            piece = caller.socket.recv(_HELLO.size - len(caller.said))
        except OSError:
            piece = b""
        caller.said += piece
        if piece and len(caller.said) < _HELLO.size:
            return
        known = False
        if len(caller.said) == _HELLO.size:
            name, key, source, target = _HELLO.unpack(caller.said)
            known = name == _NAME and hmac.compare_digest(key, self._key[:16]) and target == self.rank
        if not known:
            self._dismiss(caller, selector)
            return
        selector.unregister(caller.socket)
        del self._callers[caller.socket.fileno()]
        with suppress(OSError):
            caller.socket.sendall(self._key[16:])
        if source in self._early:
            self._early[source].close()
        self._early[source] = caller.socket

    def _dismiss(self, caller: _Caller, selector: selectors.BaseSelector) -> None:
        selector.unregister(caller.socket)
        del self._callers[caller.socket.fileno()]
        caller.socket.close()

    def _hear_answer(
        self, peer: int, one: socket.socket, answers: dict[int, bytes], selector: selectors.BaseSelector
    ) -> None:
        assert self._key is not None
        try:
            piece = one.recv(_KEY - 16 - len(answers[peer]))
        except BlockingIOError:
            return
        except OSError:
            piece = b""
        if not piece:
            raise PeerLost(
                f"rank {peer} closed the connection before it had answered: was it killed, or does another job listen at "
                "its address?",
                peer,
            )
        answers[peer] += piece
        if len(answers[peer]) == _KEY - 16:
            selector.unregister(one)
            if not hmac.compare_digest(answers[peer], self._key[16:]):
                raise PeerLost(f"what listens at rank {peer}'s address does not know this session's key", peer)

    def _missing(self, peer: int) -> PeerLost:
        return PeerLost(
            f"rank {peer} did not come to the collective within {self.timeout_s:g} s: is its process alive?", peer
        )


def _hand_over(one: socket.socket) -> int:
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT)
    one.setblocking(False)
    return one.detach()


def _left(until: float) -> float:
    return max(until - time.monotonic(), 0.01)
