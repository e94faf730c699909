"""Control messages: join, keep-alive, abort, leave; one JSON object in a packet of kind CONTROL.

With a token each carries 16 bytes of HMAC-SHA256 under a key derived from it.
"""

import hashlib
import hmac
import json
from typing import Any

from trainkit.switchml import _packet as packet
from trainkit.switchml._packet import Header, Kind

Message = dict[str, Any]
MAX_BYTES = 9000
PROTOCOL = 1

_HEADER = packet.encode(Header(packet.MAGIC, Kind.CONTROL, *[0] * (len(packet.HEADER) - 2)))


def is_control(data: bytes) -> bool:
    """Whether a packet is meant for the session's control, by its second byte."""
    return len(data) >= packet.HEADER_BYTES and data[0] == packet.MAGIC and data[1] == Kind.CONTROL


def control_key(token: bytes) -> bytes:
    """Key of the control messages' tags; empty without a token."""
    return hmac.new(token, b"trainkit switchml control", hashlib.sha256).digest() if token else b""


def encode(message: Message, key: bytes, size: int = 0) -> bytes:
    """A control packet, filled up with blanks to `size` bytes."""
    body = _HEADER + json.dumps(message, separators=(",", ":")).encode()
    body = body.ljust(size - (packet.TAG_BYTES if key else 0))
    return body + (hmac.new(key, body, hashlib.sha256).digest()[: packet.TAG_BYTES] if key else b"")


def decode(data: bytes, key: bytes) -> Message | None:
    """The message of a control packet; None where it is not one or its tag is wrong. Never raises."""
    if not is_control(data) or len(data) > MAX_BYTES:
        return None
    if key:
        data, tag = data[: -packet.TAG_BYTES], data[-packet.TAG_BYTES :]
        if not hmac.compare_digest(tag, hmac.new(key, data, hashlib.sha256).digest()[: packet.TAG_BYTES]):
            return None
    try:
        message = json.loads(data[packet.HEADER_BYTES :])
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and isinstance(message.get("op"), str) else None
