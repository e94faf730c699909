"""The address that other hosts reach this one at."""

import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from trainkit.collectives._exchange import Exchange

VARIABLE = "GLOO_SOCKET_IFNAME"
"""torch's own variable for the interface that gloo uses."""
_SIOCGIFADDR = 0x8915
_DOCUMENTATION = ("192.0.2.1", "2001:db8::1")  # RFC 5737, RFC 3849: nobody is there, so the default route leads to them


def own_address(interface: str | None = None, towards: str | None = None) -> str:
    """This host's address, IPv4 or IPv6.

    Args:
        interface: name of a network interface, or an address of this machine; None takes the one that
            GLOO_SOCKET_IFNAME names, or else the one that leads to `towards`.
        towards: host name or address; None takes torchrun's MASTER_ADDR, or else this host's name.

    Raises:
        ValueError: there is no such interface, or it has no address.
    """
    named = interface or os.environ.get(VARIABLE, "").split(",")[0]
    if named:
        try:
            return str(ipaddress.ip_address(named))
        except ValueError:
            pass
        found = _of_interface(named)
        if found is None:
            where = "interface" if interface else VARIABLE
            raise ValueError(
                f"{where} must be a network interface with an address, got {named!r}: `ip -brief address` lists them"
            )
        return found
    return _routes(towards or os.environ.get("MASTER_ADDR") or socket.gethostname()) or "127.0.0.1"


def reachable_address(exchange: Exchange, interface: str | None) -> str:
    """The same, never a loopback one where ranks are on other hosts. Every rank makes this call.

    A host's own name may resolve to 127.0.1.1 on itself (Debian's default); the others' addresses then show the way.

    Raises:
        ValueError: the only address found is a loopback one; or see `own_address`.
        RankMissing: a rank did not come in time.
    """
    refused = ""
    try:
        address = own_address(interface)
    except ValueError as error:  # the others must not wait
        refused, address = str(error), ""
    everyone = exchange.gather([identity(), address, refused])
    for host, _, why in everyone:
        if why:
            raise ValueError(f"{host.split()[0]}: {why}")
    others = [str(there) for host, there, _ in everyone if host != everyone[exchange.rank][0]]
    if not others or not is_loopback(address):
        return address
    return default_address(interface, [there for there in others if not is_loopback(there)])


def default_address(interface: str | None, others: Sequence[str] = ()) -> str:
    """This host's address where its own name says nothing: the one that leads to other hosts, or to anywhere.

    Raises:
        ValueError: the only address found is a loopback one.
    """
    for there in (*others, *_DOCUMENTATION):
        found = own_address(interface) if interface is not None else _routes(there)
        if found is not None and not is_loopback(found):
            return found
    raise ValueError(
        f"hosts cannot reach {socket.gethostname()} at its loopback address: set {VARIABLE} to a network interface that "
        "leads to them, or name it with interface="
    )


def is_loopback(address: str) -> bool:
    """Whether an address stays on its host."""
    with suppress(ValueError):
        return ipaddress.ip_address(address.split("%")[0]).is_loopback
    return False


def identity() -> str:
    """The same for processes that share a network stack, and for no others; the host's name first."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        boot += os.readlink("/proc/self/ns/net")
    return f"{socket.gethostname()} {boot}"


def endpoint(address: str, port: int) -> str:
    """An address and a port as people write them."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def parse_endpoint(text: str, what: str, *, least_port: int = 1) -> tuple[str, int]:
    """Host and port of HOST:PORT; an IPv6 address stands in brackets.

    Raises:
        ValueError: it is none.
    """
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    if not bare or (":" in host and bare == host) or not port.isdecimal() or not least_port <= int(port) < 65536:
        raise ValueError(
            f"{what} is HOST:PORT with a port from {least_port} to 65535, an IPv6 address in brackets such as "
            f"[fd00::1]:29400, got {text!r}"
        )
    return bare, int(port)


def family(address: str) -> socket.AddressFamily:
    """Which one an address is of."""
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def _routes(towards: str) -> str | None:
    """The source address of the route to a host: of all that its name stands for, one that is not loopback first."""
    found: list[str] = []
    with suppress(OSError):
        for kind, _, _, _, there in socket.getaddrinfo(towards, 9, type=socket.SOCK_DGRAM):
            with socket.socket(kind, socket.SOCK_DGRAM) as asker, suppress(OSError):
                asker.connect(there)  # sends nothing: only the route is looked up
                found.append(str(asker.getsockname()[0]))
    return min(found, key=is_loopback, default=None)


def _of_interface(name: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asker, suppress(OSError):
        row = fcntl.ioctl(asker.fileno(), _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        return socket.inet_ntoa(row[20:24])
    with suppress(OSError):
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            digits, _, _, scope, _, device = line.split()
            if device == name and scope != "20":  # 20: link-local, of use only with a zone
                return str(ipaddress.IPv6Address(bytes.fromhex(digits)))
    return None
