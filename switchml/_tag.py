"""The tag behind a packet: that it comes from a holder of the token and was not changed.

AES-256-GMAC of OpenSSL's libcrypto, 16 bytes. The nonce is all of the header (direction, worker, epoch, chunk and
slot version are in it) and, where there is one, the bitmap: a repeat is the same bytes, and no two messages of an
epoch share a nonce.
"""

from trainkit.switchml._native import hkdf, seal, unseal


def tagged(packet: bytes, key: bytes) -> bytes:
    """The packet with its tag; unchanged with an empty key."""
    return bytes(seal(packet, key)) if key else packet


def open_tagged(packet: bytes, key: bytes) -> bytes | None:
    """The packet without its tag; None where the tag is wrong, unchanged with an empty key."""
    return unseal(packet, key) if key else packet


def session_key(token: bytes, salt: bytes, epoch: int) -> bytes:
    """Key of one epoch's tags: HKDF-SHA256 of the token (RFC 5869), 32 bytes."""
    return bytes(hkdf(token, salt, b"trainkit switchml data" + epoch.to_bytes(4, "big"), 32))
