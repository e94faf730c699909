"""The packet table: every field that travels between a worker and a switch, once.

The Python and the C++ state machines, the packet vectors and a P4 parser are all checked against `HEADER`,
`Kind` and the two profiles below. All fields are big-endian, the payload is a vector of big-endian integers.

    | header 20 B | payload: `elements` integers of the wire's width, or the 8-byte bitmap | tag 16 B (full, with a token) |
"""

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

MAGIC = 0xB1
DEFAULT_PORT = 0xBEE0
TAG_BYTES = 16
SLOT_MASK = 0x3FFF
VERSION_BIT = 0x8000
FROM_SWITCH = 0xFF
NON_FINITE = 0xFF
CHANNEL_MASK = 0x3F
BUCKET_SHIFT = 6
MAX_WORKERS = 64
KERNEL_ELEMENTS = 352
"""Payload that a switch inside a kernel takes besides those of profile `core`: what an Ethernet frame carries."""


@dataclass(frozen=True)
class Field:
    """One header field: its name, its width in bits and what it says."""

    name: str
    bits: int
    about: str


HEADER = (
    Field("magic", 8, "0xB1: this protocol, first version"),
    Field("kind", 8, "what the packet is: see Kind"),
    Field("session", 16, "number that the switch gave the session at its join"),
    Field("epoch", 32, "number that the switch gave this rendezvous of workers; another epoch changes nothing"),
    Field("chunk", 32, "position in the stream of chunks of the epoch, from 0, never reused"),
    Field("slot", 16, "bit 15: version, chunk // slots % 2; bits 13 to 0: slot, chunk % slots"),
    Field("worker", 8, "rank of the sender; 0xFF from the switch"),
    Field(
        "exponent",
        8,
        "max-reduced: fp32 exponent field of the largest magnitude of a chunk to come, 0xFF: inf or NaN; "
        "in PROGRESS 1: an answer to the receiver's own QUERY",
    ),
    Field("elements", 16, "integers in the payload; 0: exponent only, or no payload"),
    Field("wire", 8, "width of the payload's integers in bytes: 4, 2 or 1"),
    Field("lane", 8, "channel: which independent stream of the session; in profile full, bits 7 and 6: bucket % 4"),
)

_STRUCT = struct.Struct(">" + "".join({8: "B", 16: "H", 32: "I"}[field.bits] for field in HEADER))
HEADER_BYTES = _STRUCT.size


class Kind(IntEnum):
    """What a packet is. DATA to PROGRESS exist in both profiles, QUERY in `full` only."""

    DATA = 1
    """Worker to switch: add this payload, take the maximum of this exponent."""
    RESULT = 2
    """Switch to worker: the sum and the largest exponent; the acknowledgement and the clock."""
    PROGRESS = 3
    """Switch to a worker that is missing from an unfinished chunk: the bitmap of the workers seen."""
    QUERY = 4
    """Worker to switch: a retransmission without payload; answered with RESULT or PROGRESS."""
    CONTROL = 16
    """Join, leave, keep-alive and abort: a JSON object as payload."""


class Header(NamedTuple):
    """The fields of `HEADER`, in order."""

    magic: int
    kind: int
    session: int
    epoch: int
    chunk: int
    slot: int
    worker: int
    exponent: int
    elements: int
    wire: int
    lane: int


@dataclass(frozen=True)
class Profile:
    """What a switch must be able to do to take part."""

    name: str
    elements: tuple[int, ...]
    """Allowed payload sizes; two numbers are a range, ends included."""
    workers: int
    """Most workers in a session."""
    wires: tuple[str, ...]
    """Allowed wire formats."""
    tagged: bool
    """A tag may follow the payload."""
    queries: bool
    """QUERY is known; without it a retransmission is the DATA packet itself."""

    @property
    def sizes(self) -> str:
        """The allowed payload sizes in words."""
        low, high = self.elements
        return f"{low}, {high} or {KERNEL_ELEMENTS}" if self.name == "core" else f"{low} to {high}"

    def allows(self, elements: int) -> bool:
        """Whether a session of this profile may carry `elements` integers a packet."""
        if self.name == "core":
            return elements in (*self.elements, KERNEL_ELEMENTS)
        return self.elements[0] <= elements <= self.elements[1]


CORE = Profile("core", (64, 256), 32, ("int32",), tagged=False, queries=False)
"""What P4 and XDP can do: int32, 64 or 256 elements, no tag; every DATA of a session has all its elements or none."""
MAX_ELEMENTS = 16367
"""What a UDP datagram carries beside header and tag."""
FULL = Profile("full", (64, MAX_ELEMENTS), MAX_WORKERS, ("int32", "int16", "int8"), tagged=True, queries=True)
"""What the software switch does."""
PROFILES = {profile.name: profile for profile in (CORE, FULL)}

UP_BYTES = {"int32": 4, "int16": 2, "int8": 1}
"""Width of an integer from worker to switch."""
DOWN_BYTES = {"int32": 4, "int16": 4, "int8": 2}
"""Width of an integer from switch to worker: wide enough for the sum of 64 workers."""


def encode(header: Header, payload: bytes = b"") -> bytes:
    """The bytes of a packet, without a tag."""
    return _STRUCT.pack(*header) + payload


def decode(packet: bytes) -> tuple[Header, memoryview] | None:
    """Take a packet apart.

    Returns:
        Header and payload; None where the packet is not one of this protocol or its length does not fit its
        header. Never raises, whatever the bytes.
    """
    if len(packet) < HEADER_BYTES or packet[0] != MAGIC:
        return None
    header = Header(*_STRUCT.unpack_from(packet))
    payload = memoryview(packet)[HEADER_BYTES:]
    kind = header.kind
    if kind == Kind.CONTROL:
        return header, payload
    if kind in (Kind.DATA, Kind.RESULT):
        fits = header.wire in (1, 2, 4) and len(payload) == header.elements * header.wire
    elif kind == Kind.PROGRESS:
        fits = header.elements == 0 and len(payload) == 8
    else:
        fits = kind == Kind.QUERY and header.elements == 0 and len(payload) == 0
    return (header, payload) if fits else None


def slot_field(chunk: int, slots: int) -> int:
    """The slot field of a chunk: its slot and its version."""
    return chunk % slots | (VERSION_BIT if chunk // slots & 1 else 0)
