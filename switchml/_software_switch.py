"""The software switch: one thread and one port a lane."""

import dataclasses
import socket
from types import TracebackType

from trainkit.switchml import _control as control
from trainkit.switchml._at_exit import close_at_exit
from trainkit.switchml._buffers import enlarge, parse_address
from trainkit.switchml._options import MAX_LANES, read_token
from trainkit.switchml._session import Limits
from trainkit.switchml._shard import COUNTED, Shard


class SoftwareSwitch:
    """Adds the gradients of all sessions that join it. A context manager; runs from construction to `close`.

    Args:
        listen: "host:port"; port 0 takes a free one, see `address`. Further threads take the ports after it.
        token_file: file with the secret that workers must share; needed beyond loopback.
        insecure: take workers without a token beyond loopback.
        limits: what is admitted.
        threads: lanes, each with a thread and a port; a slot belongs to one lane.

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
        if not 1 <= threads <= MAX_LANES:
            raise ValueError(f"threads are 1 to {MAX_LANES}, got {threads}")
        token = trusted(listen, token_file, insecure)
        sockets = _bound(listen, threads)
        buffers = [enlarge(endpoint) for endpoint in sockets]
        limits = limits or Limits()
        limits = dataclasses.replace(limits, memory=limits.memory // threads)
        ports = tuple(int(endpoint.getsockname()[1]) for endpoint in sockets)
        self.address = "{}:{}".format(*sockets[0].getsockname())
        self._shards = [
            Shard(endpoint, buffer, token, limits, lane, ports)
            for lane, (endpoint, buffer) in enumerate(zip(sockets, buffers, strict=True))
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
    if not token and not insecure and not host.startswith("127.") and host != "localhost":
        raise ValueError(
            f"listening on {host} without a token would let anyone change gradients: give --token-file "
            "(`openssl rand -hex 32 > FILE`), or --insecure on a network that only you use"
        )
    return token


def _bound(listen: str, count: int) -> list[socket.socket]:
    host, port = parse_address(listen, "listen")
    sockets: list[socket.socket] = []
    for number in range(count):
        sockets.append(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        place = (host, port + number if port else 0)
        try:
            sockets[-1].bind(place)
        except (OSError, OverflowError) as error:
            for endpoint in sockets:
                endpoint.close()
            why = error.strerror if isinstance(error, OSError) else "no such port"
            raise OSError(
                f"cannot listen on {host}:{place[1]}: {why}: take another port, or 0 for a free one"
            ) from error
    return sockets
