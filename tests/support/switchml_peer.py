"""A worker's half of the control protocol, byte by byte, sharing nothing with the product's but the packet's first 20 bytes.

For switches that are driven by packets alone: the session table, the fixed switch, the P4 control plane, the recorder.
"""

import hashlib
import hmac
import json
import secrets
import struct
from typing import Any

TAG = 16


def packed(session: int, epoch: int, sender: int, message: dict[str, Any], key: bytes, size: int = 0) -> bytes:
    """A control packet."""
    header = struct.pack(">BBHIIHBBHBB", 0xB1, 16, session, epoch, 0, 0, sender, 0, 0, 0, 0)
    body = (header + json.dumps(message).encode()).ljust(size)
    return body + (hmac.new(key, body, hashlib.sha256).digest()[:TAG] if key else b"")


def token_key(token: bytes) -> bytes:
    return hmac.new(token, b"trainkit switchml control", hashlib.sha256).digest() if token else b""


def said(data: bytes, key: bytes) -> dict[str, Any] | None:
    """What a control packet says, if its tag is right."""
    body, tag = (data[:-TAG], data[-TAG:]) if key else (data, b"")
    if key and hmac.new(key, body, hashlib.sha256).digest()[:TAG] != tag:
        return None
    return dict(json.loads(body[20:]))


class Peer:
    """One rank that joins one session."""

    def __init__(self, rank: int, world: int, token: bytes = b"", **changes: Any) -> None:
        self.rank, self.world, self.token = rank, world, token
        self.nonce, self.cookie = secrets.token_hex(16), ""
        self.offer: dict[str, Any] | None = None
        self.key = {"control": b"", "data": b""}
        self.began = False
        self.pings = 1000
        self.asked = {
            "op": "join", "v": 2, "session": "s", "job": "", "rank": rank, "world": world, "elements": 64, "slots": 4,
            "wire": "int32", "profile": "full", "channels": 64, **changes,
        }  # fmt: skip

    def join(self) -> bytes:
        return packed(0, 0, 0, {**self.asked, "nonce": self.nonce, "cookie": self.cookie}, token_key(self.token))

    def within(self, message: dict[str, Any], size: int = 128) -> bytes:
        """A message of the epoch that was offered."""
        assert self.offer is not None
        return packed(self.offer["session"], self.offer["epoch"], self.rank, message, self.key["control"], size)

    def ready(self) -> bytes:
        return self.within({"op": "ready"})

    def ping(self) -> bytes:
        self.pings += 1
        return self.within({"op": "ping", "n": self.pings}, 300)

    def question(self) -> bytes:
        """What a worker that joins sends now."""
        return self.ready() if self.offer else self.join()

    def take(self, data: bytes) -> dict[str, Any] | None:
        """Take a packet in; what it says, where it is for this join."""
        if data[1] != 16 or data[14] != 0xFF:
            return None
        epoch = int.from_bytes(data[4:8], "big")
        if epoch:
            if self.offer is None or epoch != self.offer["epoch"]:
                return None
            message = said(data, self.key["control"])
            self.began = self.began or (message is not None and message["op"] == "go")
            return message
        message = said(data, token_key(self.token))
        if message is None or message.get("nonce") != self.nonce:
            return message if message and message["op"] == "lost" else None
        if message["op"] == "retry":
            self.cookie = message["cookie"]
        if message["op"] == "offer":
            self.offer = message
            agreed = struct.pack(
                ">HIBIIB", *(message[name] for name in ("session", "epoch", "world", "slots", "elements", "channel"))
            )
            context = agreed + f"{message['wire']} {message['profile']}".encode() + bytes.fromhex(message["said"])
            extracted = hmac.new(bytes.fromhex(message["salt"]), self.token, hashlib.sha256).digest()
            for what in self.key:
                info = b"trainkit switchml " + what.encode() + b"\0" + context + b"\1"
                self.key[what] = hmac.new(extracted, info, hashlib.sha256).digest()
        return message


def met(switch: Any, peers: list[Peer], addresses: list[Any], now: float = 1.0) -> list[list[dict[str, Any]]]:
    """Let peers join over `switch.receive(data, source, now)` until all have begun; what each has heard."""
    heard: list[list[dict[str, Any]]] = [[] for _ in peers]
    for _ in range(12):
        for rank, peer in enumerate(peers):
            for address, answer in switch.receive(peer.question(), addresses[rank], now):
                assert address == addresses[rank]
                heard[rank].append(peer.take(answer) or {})
        if all(peer.began for peer in peers):
            return heard
    return heard
