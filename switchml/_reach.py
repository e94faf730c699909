"""Finding the switch: which of a name's addresses answers, and how large a packet the path carries."""

import contextlib
import logging
import secrets
import select
import socket
import time

from trainkit.switchml import _control as control
from trainkit.switchml import _packet as packet
from trainkit.switchml._buffers import enlarge, is_loopback, parse_address, truesize, unfragmented
from trainkit.switchml._errors import SwitchUnreachable
from trainkit.switchml._options import Options

_log = logging.getLogger(__name__)

RETRY = 0.1
NAME_AFTER = 5.0
_PROBES = 3
_QUESTION = 128
# UDP payloads: jumbo frames, Ethernet, common tunnels, IPv6's minimum, what every path carries; IPv4's and IPv6's
_SIZES = (8972, 8952, 1472, 1452, 1422, 1402, 1372, 1352, 1232, 548)


def reached(options: Options, key: bytes) -> tuple[socket.socket, int]:
    """A socket connected to the switch, which has answered, and the size of its receive buffer.

    A name may have several addresses: the first that answers is taken.

    Args:
        options: what the user asked for.
        key: of control messages.

    Raises:
        SwitchUnreachable: the name has no address, or none answers in time.
    """
    endpoints = _endpoints(options)
    try:
        found = _first(endpoints, options, key)
    except BaseException:
        for endpoint in endpoints:
            endpoint.close()
        raise
    for endpoint in endpoints:
        if endpoint is not found:
            endpoint.close()
    return found, found.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def _endpoints(options: Options) -> list[socket.socket]:
    host, port = parse_address(options.switch, "switch")
    endpoints: list[socket.socket] = []
    problem: OSError | None = None
    try:
        places = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError as error:
        places, problem = [], error
    for family, kind, proto, _, address in places:
        endpoint = socket.socket(family, kind, proto)
        try:
            if options.interface:
                endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, options.interface.encode())
            enlarge(endpoint)
            endpoint.connect(address)
            endpoint.setblocking(False)
            endpoints.append(endpoint)
        except OSError as error:  # a family that this machine does not speak
            endpoint.close()
            problem = error
    if not endpoints:
        raise SwitchUnreachable(f"switch {options.switch}: {problem}: check the name, the interface and the route")
    return endpoints


def _first(endpoints: list[socket.socket], options: Options, key: bytes) -> socket.socket:
    nonce = secrets.token_hex(16)
    question = control.encode({"op": "probe", "nonce": nonce}, key, _QUESTION)
    began, named = time.monotonic(), False
    while (waited := time.monotonic() - began) < options.timeout_s:
        for endpoint in endpoints:
            with contextlib.suppress(OSError):  # refused: nobody listens there yet
                endpoint.send(question)
        until = time.monotonic() + RETRY
        while (left := until - time.monotonic()) > 0:
            for endpoint in select.select(endpoints, [], [], left)[0]:
                answer = _heard(endpoint, key)
                if answer and answer["op"] == "probed" and answer.get("nonce") == nonce:
                    return endpoint
        if waited > NAME_AFTER and not named:
            named = True
            _log.warning("no answer yet from switch %s", options.switch)
    programs = "`trainkit switch`" if options.profile == "full" else "`trainkit p4 serve` or `trainkit switch --xdp`"
    raise SwitchUnreachable(
        f"no answer from switch {options.switch} in {options.timeout_s:g} s: is {programs} running there, in this version, "
        "does it have the same token, does a firewall pass UDP?"
    )


def default_elements(endpoint: socket.socket, buffer: int, options: Options, key: bytes) -> int:
    """Elements a packet where the user names none: the most that the path carries both ways.

    On loopback, which carries anything, as many as leave room for 8 packets in half the buffer.
    """
    if options.profile == "core":
        return 256
    if is_loopback(endpoint.getpeername()[0]):
        # 8000 and not 8192: with its headers the packet still fits the kernel's block of 32 KiB
        return next((k for k in (8000, 4000) if 16 * truesize(4 * k) <= buffer), 2048)
    carried = _carried(endpoint, key)
    return min(packet.MAX_ELEMENTS, (carried - packet.HEADER_BYTES - (packet.TAG_BYTES if key else 0)) // 4)


def _carried(endpoint: socket.socket, key: bytes) -> int:
    """Bytes of the largest datagram that passes to the switch and back; the smallest size without an answer."""
    carried, nonce = 0, secrets.token_hex(16)
    for _ in range(_PROBES):
        with unfragmented(endpoint):
            for size in _SIZES:
                with contextlib.suppress(OSError):  # larger than the interface's own limit
                    endpoint.send(control.encode({"op": "probe", "nonce": nonce}, key, size))
        until = time.monotonic() + RETRY
        while carried < _SIZES[0] and (left := until - time.monotonic()) > 0:
            if select.select([endpoint], [], [], left)[0]:
                with contextlib.suppress(OSError):
                    data = endpoint.recv(65535)
                    answer = control.decode(data, key)
                    if answer and answer["op"] == "probed" and answer.get("nonce") == nonce:
                        carried = max(carried, len(data))
    return carried or _SIZES[-1]


def _heard(endpoint: socket.socket, key: bytes) -> control.Message | None:
    try:
        return control.decode(endpoint.recv(65535), key)
    except OSError:
        return None
