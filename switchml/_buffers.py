"""Socket buffers and what a packet takes of them."""

import contextlib
import ipaddress
import socket
from collections.abc import Iterator

_WANTED = 8 << 20
# SO_RCVBUFFORCE and SO_SNDBUFFORCE pass the system's limit, where the process may
_RECEIVE = (33, socket.SO_RCVBUF)
_SEND = (32, socket.SO_SNDBUF)


def truesize(payload: int) -> int:
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
    """Take "host:port" or "[IPv6 address]:port" apart.

    Raises:
        ValueError: it is not of that form.
    """
    host, colon, port = text.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{what} is host:port, got {text!r}: an IPv6 address goes in brackets, [{host}]:{port}")
    if not colon or not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{what} is host:port with a port of 0 to 65535, got {text!r}: for example 127.0.0.1:48864")
    return host, int(port)


def joined_address(host: str, port: int) -> str:
    """The other way round."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a name or numeric address is this machine's own to itself."""
    with contextlib.suppress(ValueError):
        address = ipaddress.ip_address(host.partition("%")[0])
        mapped = getattr(address, "ipv4_mapped", None)
        return bool((mapped or address).is_loopback)
    return host in ("localhost", "ip6-localhost", "localhost.localdomain")


@contextlib.contextmanager
def unfragmented(endpoint: socket.socket) -> Iterator[None]:
    """Within, what the socket sends is dropped rather than cut into fragments."""
    always, default = 2, 1  # IP_PMTUDISC_DO, IP_PMTUDISC_WANT
    _discover(endpoint, always)
    try:
        yield
    finally:
        _discover(endpoint, default)


def _discover(endpoint: socket.socket, how: int) -> None:
    endpoint.setsockopt(socket.IPPROTO_IP, 10, how)  # IP_MTU_DISCOVER, also for IPv4 over an IPv6 socket
    if endpoint.family == socket.AF_INET6:
        endpoint.setsockopt(socket.IPPROTO_IPV6, 23, how)  # IPV6_MTU_DISCOVER
