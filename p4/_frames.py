"""Ethernet frames that the control plane sends and takes: ARP, and UDP with a control message."""

import struct
from typing import NamedTuple

from trainkit.switchml._packet import DEFAULT_PORT

_ARP, _IPV4, _UDP = 0x0806, 0x0800, 17
_REQUEST, _REPLY = 1, 2
_EVERYBODY = (1 << 48) - 1


class ArpReply(NamedTuple):
    """Who has an address."""

    ip: int
    mac: int


class Datagram(NamedTuple):
    """A UDP datagram and where it came from."""

    ip: int
    port: int
    data: bytes


def arp_request(mac: int, ip: int, wanted: int) -> bytes:
    """The frame that asks everybody for the MAC of `wanted`."""
    ethernet = _EVERYBODY.to_bytes(6, "big") + mac.to_bytes(6, "big") + struct.pack(">H", _ARP)
    question = struct.pack(">HHBBH6sI6sI", 1, _IPV4, 6, 4, _REQUEST, mac.to_bytes(6, "big"), ip, bytes(6), wanted)
    return (ethernet + question).ljust(60, b"\0")


def arp_reply(frame: bytes) -> ArpReply | None:
    """What an ARP reply says; None where the frame is none."""
    if len(frame) < 42 or frame[12:14] != struct.pack(">H", _ARP) or frame[20:22] != struct.pack(">H", _REPLY):
        return None
    return ArpReply(int.from_bytes(frame[28:32], "big"), int.from_bytes(frame[22:28], "big"))


def datagram(frame: bytes) -> Datagram | None:
    """The UDP datagram in a frame; None where there is none."""
    if len(frame) < 42 or frame[12:15] != struct.pack(">HB", _IPV4, 0x45) or frame[23] != _UDP:
        return None
    source, _, length = struct.unpack_from(">HHH", frame, 34)
    if length < 8 or 34 + length > len(frame):
        return None
    return Datagram(int.from_bytes(frame[26:30], "big"), source, frame[42 : 34 + length])


def udp_frame(source: tuple[int, int], target: tuple[int, int], port: int, data: bytes) -> bytes:
    """A datagram from the switch's (MAC, address) to a worker's (MAC, address) and UDP port."""
    ethernet = target[0].to_bytes(6, "big") + source[0].to_bytes(6, "big") + struct.pack(">H", _IPV4)
    total = 28 + len(data)
    header = struct.pack(">BBHHHBBHII", 0x45, 0, total, 0, 0x4000, 64, _UDP, 0, source[1], target[1])
    carried = sum(struct.unpack(">10H", header))
    while carried >> 16:
        carried = (carried & 0xFFFF) + (carried >> 16)
    header = header[:10] + struct.pack(">H", carried ^ 0xFFFF) + header[12:]
    return ethernet + header + struct.pack(">HHHH", DEFAULT_PORT, port, 8 + len(data), 0) + data
