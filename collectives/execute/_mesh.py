"""One TCP connection per directed pair of ranks, each end sure whom it talks to."""

import fcntl
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Protocol

from trainkit.collectives.execute._errors import ExecutionError, PeerLost

_HELLO = struct.Struct("<8s16sII")  # name and version of the protocol, session key, sender's rank, receiver's rank
_NAME = b"trainkt1"
_KEY = 32
_SHY = 2.0  # seconds that a stranger may take to say hello
_SIOCGIFADDR = 0x8915
_TCP_NOTSENT_LOWAT = 25
UNSENT = 1 << 17
"""Bytes that a connection takes in before they are on their way; nothing more urgent overtakes them."""


class Store(Protocol):
    """What is used of `torch.distributed.Store`."""

    def set(self, key: str, value: str) -> None:
        """Publish."""

    def get(self, key: str) -> bytes:
        """Wait for a value."""

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Wait until the keys are there; a RuntimeError after `timeout`."""

    def compare_set(self, key: str, expected: str, value: str) -> bytes:
        """Set a key that has not been set (expected ""); what it then holds."""


@dataclass
class Mesh:
    """This rank's end of the connections; more are made when a schedule needs them.

    Args:
        store: shared by the ranks and by nobody else.
        rank: this rank.
        address: IPv4 address that the others reach this rank at; only it is listened on.
        deadline_s: seconds for the ranks to meet.
    """

    store: Store
    rank: int
    address: str
    deadline_s: float
    connected: set[int] = field(default_factory=set)

    def __post_init__(self) -> None:
        """Listen, and say where."""
        if self.rank == 0:
            self.store.set("key", secrets.token_hex(_KEY))
        self._early: dict[int, socket.socket] = {}
        self._listener = socket.create_server((self.address, 0), backlog=1024)
        self.store.set(f"address/{self.rank}", f"{self.address}:{self._listener.getsockname()[1]}")
        self._key: bytes | None = None

    def connect(self, peers: Iterable[int]) -> list[tuple[int, int, int]]:
        """Connect to those of `peers` that this rank is not connected to; they must do the same.

        Returns:
            (rank, file descriptor that its data comes on, file descriptor that ours goes on), now the caller's.

        Raises:
            PeerLost: a rank does not come within the deadline.
            ExecutionError: a rank is there and does not know the session.
        """
        wanted = sorted(set(peers) - self.connected)
        until = time.monotonic() + self.deadline_s
        if self._key is None and wanted:
            self._key = bytes.fromhex(self._told("key", 0, until))
        ways: dict[int, socket.socket] = {}
        comes: dict[int, socket.socket] = {}
        try:
            for peer in wanted:
                ways[peer] = self._call(peer, until)
            for peer in wanted:
                comes[peer] = self._answer(peer, wanted, until)
            for peer, way in ways.items():
                self._check_answer(peer, way, until)
        except BaseException:
            for one in (*ways.values(), *comes.values()):
                one.close()
            raise
        self.connected.update(wanted)
        return [(peer, _hand_over(comes[peer]), _hand_over(ways[peer])) for peer in wanted]

    def close(self) -> None:
        """Stop listening."""
        self._listener.close()
        for one in self._early.values():
            one.close()

    def _call(self, peer: int, until: float) -> socket.socket:
        assert self._key is not None
        host, port = self._told(f"address/{peer}", peer, until).rsplit(":", 1)
        try:
            way = socket.create_connection((host, int(port)), _left(until), source_address=(self.address, 0))
        except TimeoutError as error:
            raise _missing(peer, self.deadline_s) from error
        except OSError as error:
            raise PeerLost(
                f"rank {peer} cannot be reached at {host}:{port} from {self.address} ({error.strerror}): "
                "check the route, or name the interface with interface=",
                peer,
            ) from error
        way.sendall(_HELLO.pack(_NAME, self._key[:16], self.rank, peer))
        return way

    def _told(self, key: str, peer: int, until: float) -> str:
        """What `peer` has put into the store."""
        try:
            self.store.wait([key], timedelta(seconds=_left(until)))
        except RuntimeError as error:
            raise _missing(peer, self.deadline_s) from error
        return self.store.get(key).decode()

    def _answer(self, peer: int, wanted: list[int], until: float) -> socket.socket:
        """The connection that `peer` opened; others that come first are kept for their turn."""
        assert self._key is not None
        while peer not in self._early:
            self._listener.settimeout(_left(until))
            try:
                caller, _ = self._listener.accept()
            except TimeoutError as error:
                raise _missing(peer, self.deadline_s) from error
            try:
                caller.settimeout(min(_SHY, _left(until)))
                name, key, source, target = _HELLO.unpack(_exactly(caller, _HELLO.size))
                if name == _NAME and hmac.compare_digest(key, self._key[:16]) and target == self.rank:
                    caller.sendall(self._key[16:])
                    self._early[source] = caller
                    continue
            except OSError:
                pass
            caller.close()  # a stranger
        return self._early.pop(peer)

    def _check_answer(self, peer: int, way: socket.socket, until: float) -> None:
        assert self._key is not None
        way.settimeout(_left(until))
        try:
            told = _exactly(way, _KEY - 16)
        except TimeoutError as error:
            raise _missing(peer, self.deadline_s) from error
        except OSError as error:
            raise ExecutionError(f"rank {peer} does not take this session's key: another job listens there") from error
        if not hmac.compare_digest(told, self._key[16:]):
            raise ExecutionError(f"what listens at rank {peer}'s address does not know this session's key")


def local_address(interface: str | None, towards: str | None) -> str:
    """The IPv4 address that other ranks reach this one at.

    Args:
        interface: name of a network interface, or an address of this machine; None takes the interface that leads to
            `towards`.
        towards: host name or address, usually torchrun's MASTER_ADDR.

    Raises:
        ValueError: there is no such interface, or it has no IPv4 address.
    """
    if interface is None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((towards or "127.0.0.1", 9))  # sends nothing: only the route is looked up
                return str(probe.getsockname()[0])
            except OSError:
                return "127.0.0.1"
    try:
        socket.inet_aton(interface)
        return interface
    except OSError:
        pass
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            row = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            raise ValueError(
                f"interface must be a network interface with an IPv4 address, got {interface!r} ({error.strerror})"
            ) from None
    return socket.inet_ntoa(row[20:24])


def _hand_over(one: socket.socket) -> int:
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, UNSENT)
    one.setblocking(False)
    return one.detach()


def _exactly(one: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count:
        piece = one.recv(count - len(data))
        if not piece:
            raise ConnectionResetError("closed")
        data += piece
    return data


def _left(until: float) -> float:
    return max(until - time.monotonic(), 0.01)


def _missing(peer: int, deadline_s: float) -> PeerLost:
    return PeerLost(f"rank {peer} did not come to the collective within {deadline_s:g} s: is its process alive?", peer)
