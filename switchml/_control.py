"""Control messages: one JSON object in a packet of kind CONTROL, with a tag behind it.

Before a worker and a switch have agreed on an epoch the header's `epoch` is 0 and the tag's key comes from the token
alone (no tag without one); such a message carries the nonce of the join, or the number of the ping, that it belongs to.
From the offer on the header names session, epoch and sender, and the tag's key is the epoch's own: it comes from the
token and from what both sides drew for this epoch alone, with and without a token. docs/how-it-works/switchml.md has
the argument.
"""

import hashlib
import hmac
import json
from typing import Any, NamedTuple

from trainkit.switchml import _packet as packet
from trainkit.switchml._packet import FROM_SWITCH, Header, Kind

Message = dict[str, Any]
MAX_BYTES = 9000
PROTOCOL = 2


class Place(NamedTuple):
    """Whose message it is: what its header says."""

    session: int
    epoch: int
    """0: there is none yet."""
    sender: int
    """Rank, or FROM_SWITCH."""


NOWHERE = Place(0, 0, 0)
SWITCH = Place(0, 0, FROM_SWITCH)


def is_control(data: bytes) -> bool:
    """Whether a packet is meant for the session's control, by its second byte."""
    return len(data) >= packet.HEADER_BYTES and data[0] == packet.MAGIC and data[1] == Kind.CONTROL


def place(data: bytes) -> Place:
    """Whose message a control packet is, or says it is."""
    return Place(int.from_bytes(data[2:4], "big"), int.from_bytes(data[4:8], "big"), data[14])


def control_key(token: bytes) -> bytes:
    """Key of the tags before there is an epoch; empty without a token."""
    return hmac.digest(token, b"trainkit switchml control", "sha256") if token else b""


def encode(message: Message, key: bytes, size: int = 0, of: Place = NOWHERE) -> bytes:
    """A control packet, filled up with blanks to `size` bytes."""
    header = Header(packet.MAGIC, Kind.CONTROL, of.session, of.epoch, 0, 0, of.sender, 0, 0, 0, 0)
    body = packet.encode(header, json.dumps(message, separators=(",", ":")).encode())
    body = body.ljust(size - (packet.TAG_BYTES if key else 0))
    return body + (hmac.digest(key, body, "sha256")[: packet.TAG_BYTES] if key else b"")


def decode(data: bytes, key: bytes) -> Message | None:
    """The message of a control packet; None where it is not one or its tag is wrong. Never raises."""
    if not is_control(data) or len(data) > MAX_BYTES:
        return None
    if key:
        data, tag = data[: -packet.TAG_BYTES], data[-packet.TAG_BYTES :]
        if not hmac.compare_digest(tag, hmac.digest(key, data, "sha256")[: packet.TAG_BYTES]):
            return None
    try:
        message = json.loads(data[packet.HEADER_BYTES :])
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and isinstance(message.get("op"), str) else None


def digest(session: str, job: str, nonces: tuple[str, ...]) -> str:
    """What the workers of an epoch have said of it: its name, its job, and each rank's nonce, as hexadecimal digits."""
    said = json.dumps([session, job, *nonces], separators=(",", ":"))
    return hashlib.sha256(said.encode()).hexdigest()
