"""Joining a session, the worker's side."""

import contextlib
import logging
import secrets
import select
import socket
import time

from trainkit.switchml import _control as control
from trainkit.switchml import _packet as packet
from trainkit.switchml._buffers import enlarge, footprint, parse_address, unfragmented
from trainkit.switchml._errors import SessionRefused, SwitchUnreachable, WorkerMissing
from trainkit.switchml._membership import Membership
from trainkit.switchml._options import MAX_LANES, Options

_log = logging.getLogger(__name__)

_RETRY = 0.1
_NAME_AFTER = 5.0
_CONFLICT = 3.0
_SLOTS = 20
_PROBES = 3
# UDP payloads: jumbo frames, Ethernet, common tunnels, IPv6's minimum, what every path carries
_SIZES = (8972, 1472, 1422, 1372, 1232, 548)


def open_socket(options: Options) -> tuple[socket.socket, int]:
    """A socket connected to the switch, and the size of its receive buffer.

    Raises:
        SwitchUnreachable: the host has no address.
    """
    host, port = parse_address(options.switch, "switch")
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, socket.AF_INET, socket.SOCK_DGRAM)[0]
        endpoint = socket.socket(family, kind, proto)
        if options.interface:
            endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, options.interface.encode())
        buffer = enlarge(endpoint)
        endpoint.connect(address)
    except OSError as error:
        raise SwitchUnreachable(
            f"switch {options.switch}: {error}: check the name, the interface and the route"
        ) from error
    endpoint.setblocking(False)
    return endpoint, buffer


def join(
    endpoint: socket.socket, buffer: int, options: Options, rank: int, world: int, token: bytes, lane: int = 0
) -> tuple[Membership, list[int]]:
    """Join; returns when all ranks have.

    Args:
        endpoint: socket connected to the switch.
        buffer: bytes of its receive buffer.
        options: what the user asked for.
        rank: this worker.
        world: workers.
        token: shared secret; empty without.
        lane: which of the session's independent streams this is.

    Returns:
        What was agreed, and the switch's port for each lane.

    Raises:
        SwitchUnreachable: no answer at all within the deadline.
        SessionRefused: the switch says no.
        WorkerMissing: other ranks did not come within the deadline.
    """
    key = control.control_key(token)
    nonce = secrets.token_hex(8)
    elements = options.elements or default_elements(endpoint, buffer, options, key)
    room = max(1, buffer // 2 // footprint(4 * elements))
    asked = {
        "op": "join", "v": control.PROTOCOL, "session": options.session, "rank": rank, "world": world, "nonce": nonce,
        "elements": elements, "slots": min(options.slots or _SLOTS, room), "wire": options.wire, "profile": options.profile,
        "lanes": options.lanes or MAX_LANES,
    }  # fmt: skip
    began = time.monotonic()
    heard = named = False
    why: tuple[str, float] | None = None
    seen: list[int] = []
    offer: control.Message | None = None
    while (waited := time.monotonic() - began) < options.deadline_s:
        send = {"op": "ready", "number": offer["session"], "epoch": offer["epoch"], "rank": rank} if offer else asked
        for message in _exchange(endpoint, send, key):
            heard = True
            if message["op"] in ("offer", "go"):
                member = _member(message, options, rank, world, token, lane)
                if member is not None and message["op"] == "go" and (offer is None or offer["epoch"] == member.epoch):
                    return member, [int(port) for port in message.get("ports", [])]
                offer = message if member is not None else None
            elif message["op"] == "lost":
                offer = None
            elif message["op"] == "refused" and message.get("nonce") == nonce:
                raise SessionRefused(f"switch {options.switch} refuses rank {rank}: {message.get('why')}")
            elif message["op"] == "wait" and message.get("nonce") == nonce:
                offer, seen = None, list(message.get("seen", []))
                said = message.get("why")
                why = (said, why[1] if why and why[0] == said else waited) if said else None
                if why and waited - why[1] > _CONFLICT:
                    raise SessionRefused(f"session {options.session!r} on switch {options.switch}: {why[0]}")
        if heard and not named and waited > _NAME_AFTER:
            named = True
            _log.warning("session %r waits for %s of %d ranks", options.session, _ranks(_absent(seen, world)), world)
        if not heard and waited > _NAME_AFTER and not named:
            named = True
            _log.warning("no answer yet from switch %s", options.switch)
    if not heard:
        raise SwitchUnreachable(
            f"no answer from switch {options.switch} in {options.deadline_s:g} s: is `trainkit switch` running there, "
            "does it have the same token, does a firewall pass UDP?"
        )
    absent = _absent(seen, world)
    raise WorkerMissing(
        f"session {options.session!r} waited {options.deadline_s:g} s for {_ranks(absent)} of {world} ranks: "
        "are they running, with the same switch and session?",
        tuple(absent),
    )


def default_elements(endpoint: socket.socket, buffer: int, options: Options, key: bytes) -> int:
    """Elements a packet where the user names none: the most that the path carries both ways.

    On loopback, which carries anything, as many as leave room for 8 packets in half the buffer.
    """
    if options.profile == "core":
        return 256
    if endpoint.getpeername()[0].startswith("127."):
        # 8000 and not 8192: with its headers the packet still fits the kernel's block of 32 KiB
        return next((k for k in (8000, 4000) if 16 * footprint(4 * k) <= buffer), 2048)
    carried = _probe(endpoint, key)
    return min(packet.FULL.elements[1], (carried - packet.HEADER_BYTES - (packet.TAG_BYTES if key else 0)) // 4)


def _probe(endpoint: socket.socket, key: bytes) -> int:
    """Bytes of the largest datagram that passes to the switch and back; the smallest size without an answer."""
    carried = 0
    for _ in range(_PROBES):
        with unfragmented(endpoint):
            for size in _SIZES:
                with contextlib.suppress(OSError):  # larger than the interface's own limit, or nobody listens yet
                    endpoint.send(control.encode({"op": "probe"}, key, size))
        until = time.monotonic() + _RETRY
        while carried < _SIZES[0] and (left := until - time.monotonic()) > 0:
            if select.select([endpoint], [], [], left)[0]:
                with contextlib.suppress(OSError):
                    data = endpoint.recv(65535)
                    answer = control.decode(data, key)
                    if answer and answer["op"] == "probed":
                        carried = max(carried, len(data))
    return carried or _SIZES[-1]


def _exchange(endpoint: socket.socket, message: control.Message, key: bytes) -> list[control.Message]:
    """Send one message and gather what comes within a moment."""
    answers: list[control.Message] = []
    until = time.monotonic() + _RETRY
    try:
        endpoint.send(control.encode(message, key))
    except OSError:  # refused: nobody listens there yet
        time.sleep(_RETRY)
        return answers
    while not answers and (left := until - time.monotonic()) > 0:
        if select.select([endpoint], [], [], left)[0]:
            try:
                answer = control.decode(endpoint.recv(65535), key)
            except OSError:
                time.sleep(max(0.0, until - time.monotonic()))
                break
            answers += [answer] if answer else []
    if answers and answers[-1]["op"] == "wait":
        time.sleep(max(0.0, min(0.02, until - time.monotonic())))
    return answers


def _member(
    message: control.Message, options: Options, rank: int, world: int, token: bytes, lane: int
) -> Membership | None:
    try:
        member = Membership(
            message["session"], message["epoch"], message["world"], rank, message["slots"], message["elements"],
            message["wire"], message["profile"], message["lane"],
        )  # fmt: skip
        asked = (world, options.wire, options.profile, lane)
        usable = (member.world, member.wire, member.profile, member.lane) == asked
        return member.with_key(token, message["salt"]) if usable and member.slots > 0 else None
    except (KeyError, TypeError, ValueError):
        return None


def _absent(seen: list[int], world: int) -> list[int]:
    return [rank for rank in range(world) if rank not in seen]


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
