"""The software switch: one thread and one port a channel."""

import dataclasses
import socket
from types import TracebackType

from trainkit.switchml import _control as control
from trainkit.switchml._at_exit import close_at_exit
from trainkit.switchml._buffers import enlarge, is_loopback, joined_address, parse_address
from trainkit.switchml._limits import Limits
from trainkit.switchml._options import MAX_CHANNELS, read_token
from trainkit.switchml._shard import COUNTED, Shard


class SoftwareSwitch:
    """Adds the gradients of all sessions that join it. A context manager; runs from construction to `close`.

    Args:
        listen: "host:port", "[address]:port" for IPv6; "0.0.0.0:port" and "[::]:port" take all of the machine's addresses
            and answer from the one that was asked. Port 0 takes a free one, see `address`. Further threads take the
            ports after it.
        token_file: file with the secret that workers must share; needed beyond loopback.
        insecure: take workers without a token beyond loopback.
        limits: what is admitted.
        threads: channels, each with a thread and a port; a slot belongs to one channel.

    Raises:
        ValueError: no token beyond loopback, or a malformed address.
        OSError: an address cannot be bound.

    Example:
        >>> with SoftwareSwitch() as switch:
        ...     state = SwitchMLState(switch.address, rank=0, world_size=1)
    """

    def __init__(
        self,
        listen: str = "127.0.0.1:0",
        *,
        token_file: str | None = None,
        insecure: bool = False,
        limits: Limits | None = None,
        threads: int = 1,
    ) -> None:
        if not 1 <= threads <= MAX_CHANNELS:
            raise ValueError(f"threads are 1 to {MAX_CHANNELS}, got {threads}")
        token = trusted(listen, token_file, insecure)
        sockets = _bound(listen, threads)
        buffers = [enlarge(endpoint) for endpoint in sockets]
        limits = limits or Limits()
        limits = dataclasses.replace(limits, memory=limits.memory // threads)
        ports = tuple(int(endpoint.getsockname()[1]) for endpoint in sockets)
        self.address = joined_address(*sockets[0].getsockname()[:2])
        self._shards = [
            Shard(endpoint, buffer, token, limits, channel, ports)
            for channel, (endpoint, buffer) in enumerate(zip(sockets, buffers, strict=True))
        ]
        close_at_exit(self)

    def counters(self) -> dict[str, int]:
        """Packets and bytes each way, finished chunks, and packets refused by their cause, all sessions together."""
        totals = [shard.counters() for shard in self._shards]
        return {name: sum(total[name] for total in totals) for name in COUNTED}

    def sessions(self) -> list[control.Message]:
        """A row a session: name, epoch, agreed sizes, seconds since each worker was heard."""
        return self._shards[0].sessions()

    def close(self) -> None:
        """Stop; workers see that the switch no longer answers."""
        for shard in self._shards:
            shard.close()

    def __enter__(self) -> "SoftwareSwitch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def trusted(listen: str, token_file: str | None, insecure: bool) -> bytes:
    """The secret of a switch at `listen`; empty without one, where it may be.

    Raises:
        ValueError: it may not.
    """
    host, _ = parse_address(listen, "listen")
    token = read_token(token_file)
    if not token and not insecure and not is_loopback(host):
        raise ValueError(
            f"listening on {host} without a token would let anyone change gradients: give --token-file "
            "(`(umask 077 && openssl rand -hex 32 > FILE)`), or --insecure on a network that only you use"
        )
    return token


def _bound(listen: str, count: int) -> list[socket.socket]:
    host, port = parse_address(listen, "listen")
    sockets: list[socket.socket] = []
    for number in range(count):
        wanted = port + number if port else 0
        try:
            sockets.append(bound(host, wanted))
        except OSError:
            for endpoint in sockets:
                endpoint.close()
            raise
    return sockets


def bound(host: str, port: int) -> socket.socket:
    """A UDP socket at an address of this machine; an IPv6 wildcard takes IPv4, too.

    Raises:
        OSError: it cannot be bound; the message says what to do.
    """
    endpoint: socket.socket | None = None
    try:
        family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM, flags=socket.AI_PASSIVE)[0]
        endpoint = socket.socket(family, socket.SOCK_DGRAM)
        if family == socket.AF_INET6:
            endpoint.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        endpoint.bind(place)
        return endpoint
    except (OSError, OverflowError) as error:
        if endpoint is not None:
            endpoint.close()
        why = error.strerror if isinstance(error, OSError) else "no such port"
        raise OSError(
            f"cannot listen on {joined_address(host, port)}: {why}: take another port, or 0 for a free one"
        ) from error
