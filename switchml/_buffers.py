"""Socket buffers and what a packet takes of them."""

import contextlib
import socket
from collections.abc import Iterator

_WANTED = 8 << 20
# SO_RCVBUFFORCE and SO_SNDBUFFORCE pass the system's limit, where the process may
_RECEIVE = (33, socket.SO_RCVBUF)
_SEND = (32, socket.SO_SNDBUF)


def footprint(payload: int) -> int:
    """Bytes that a packet of `payload` bytes takes of a receive buffer: the kernel counts whole power-of-two blocks."""
    return int(2 ** max(10, (payload + 640 - 1).bit_length()) + 256)


def enlarge(endpoint: socket.socket) -> int:
    """Ask for large buffers; the bytes of the receive buffer as the kernel counts them."""
    for force, plain in (_RECEIVE, _SEND):
        try:
            endpoint.setsockopt(socket.SOL_SOCKET, force, _WANTED)
        except OSError:
            endpoint.setsockopt(socket.SOL_SOCKET, plain, _WANTED)
    return endpoint.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def parse_address(text: str, what: str) -> tuple[str, int]:
    """Take "host:port" apart.

    Raises:
        ValueError: it is not of that form.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{what} is host:port with a port of 0 to 65535, got {text!r}: for example 127.0.0.1:48864")
    return host, int(port)


@contextlib.contextmanager
def unfragmented(endpoint: socket.socket) -> Iterator[None]:
    """Within, what the socket sends is dropped rather than cut into fragments."""
    discover, always, default = 10, 2, 1  # IP_MTU_DISCOVER, IP_PMTUDISC_DO, IP_PMTUDISC_WANT
    endpoint.setsockopt(socket.IPPROTO_IP, discover, always)
    try:
        yield
    finally:
        endpoint.setsockopt(socket.IPPROTO_IP, discover, default)
