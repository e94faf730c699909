"""Floods a live session from a namespace of its own: forged, replayed, truncated and bit-flipped packets.

It listens on a port of the bridge, as nobody on a switched network could, and so knows session, epoch, chunk, slot and
the addresses and ports of the workers at every moment. Prints one JSON line when it begins and one when it is done.
"""

import ctypes
import json
import os
import random
import socket
import struct
import sys
import time

from trainkit.switchml import _packet as packet
from trainkit.switchml._packet import Kind

_BATCH = 256
_HEADS = 14 + 20 + 8
KINDS = ("forged", "replayed", "truncated", "flipped")


def _raw(interface: str) -> socket.socket:
    endpoint = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
    endpoint.bind((interface, 0))
    return endpoint


def _raw_in(namespace: str, interface: str) -> socket.socket:
    """A raw socket in another network namespace."""
    home, other = os.open("/proc/self/ns/net", os.O_RDONLY), os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    enter = ctypes.CDLL(None).setns
    enter(other, 0)
    endpoint = _raw(interface)
    enter(home, 0)
    return endpoint


def _split(frame: bytes, tag: int, own: bytes) -> tuple[bytes, bytes] | None:
    """Heads and first packet of a genuine frame; the kernel may have joined several behind one head."""
    payload = frame[_HEADS:]
    if frame[6:12] == own:
        return None
    if (
        len(payload) < packet.HEADER_BYTES
        or frame[12:14] != b"\x08\x00"
        or frame[23] != 17
        or payload[0] != packet.MAGIC
    ):
        return None
    elements, wire = int.from_bytes(payload[16:18], "big"), payload[18]
    body = {Kind.DATA: elements * wire, Kind.RESULT: elements * wire, Kind.PROGRESS: 8, Kind.QUERY: 0}.get(payload[1])  # type: ignore[call-overload]
    return None if body is None else (frame[:_HEADS], payload[: packet.HEADER_BYTES + body + tag])


def _framed(heads: bytes, payload: bytes, mac: bytes) -> bytes:
    """The frame from our own interface but from the stated address and port."""
    ip = bytearray(heads[14:34])
    struct.pack_into(">H", ip, 2, 28 + len(payload))
    ip[10:12] = b"\0\0"
    total = sum(struct.unpack(">10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    struct.pack_into(">H", ip, 10, ~(total + (total >> 16)) & 0xFFFF)
    return heads[:6] + mac + heads[12:14] + ip + heads[34:38] + struct.pack(">HH", 8 + len(payload), 0) + payload


def _spoiled(kind: str, genuine: bytes, slots: int, noise: bytes, seeded: random.Random) -> bytes:
    if kind == "forged":  # of this chunk or one to come, any sum, a tag that is none
        chunk = int.from_bytes(genuine[8:12], "big") + seeded.randrange(2 * slots)
        place = chunk.to_bytes(4, "big") + packet.slot_field(chunk, slots).to_bytes(2, "big")
        at = seeded.randrange(len(noise) - len(genuine))
        return genuine[:8] + place + genuine[14:20] + noise[at : at + len(genuine) - 20]
    if kind == "truncated":
        return genuine[: seeded.randrange(len(genuine))]
    if kind == "flipped":
        broken = bytearray(genuine)
        broken[seeded.randrange(len(broken))] ^= 1 << seeded.randrange(8)
        return bytes(broken)
    return genuine


def flood(plan: dict[str, int | str]) -> None:
    """Send `packets` packets, chosen evenly from `KINDS`, towards the switch and (one in eight) the workers."""
    inject, listen = _raw("eth0"), _raw_in(str(plan["hub"]), "p0")
    listen.setblocking(False)
    mac = inject.getsockname()[4]
    seeded, noise = random.Random(0), random.Random(1).randbytes(1 << 16)
    slots, tag, wanted = int(plan["slots"]), int(plan["tag"]), int(plan["packets"])
    recent: dict[bool, list[tuple[bytes, bytes]]] = {True: [], False: []}
    sent = dict.fromkeys(KINDS, 0)
    began, unsent = 0.0, 0
    while sum(sent.values()) < wanted:
        for _ in range(_BATCH):
            try:
                split = _split(listen.recv(65535), tag, mac)
            except BlockingIOError:
                break
            if split:
                kept = recent[split[1][14] == packet.FROM_SWITCH]
                kept.append(split)
                del kept[:-64]
        if not all(recent.values()):
            time.sleep(0.001)
            continue
        if not began:
            began = time.monotonic()
            print(json.dumps({"began": True}), flush=True)
        for number in range(min(_BATCH, wanted - sum(sent.values()))):
            kind = KINDS[number % 4]
            heads, genuine = seeded.choice(recent[seeded.randrange(8) == 0])
            try:
                inject.send(_framed(heads, _spoiled(kind, genuine, slots, noise, seeded), mac))
            except OSError:
                unsent += 1
            sent[kind] += 1
    seconds = time.monotonic() - began
    print(json.dumps({"sent": sent, "unsent": unsent, "seconds": seconds}), flush=True)


if __name__ == "__main__":
    flood(json.loads(sys.argv[1]))
