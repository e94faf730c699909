"""The tag behind a packet: that it comes from a holder of the token and was not changed.

AES-256-GMAC of OpenSSL's libcrypto, 16 bytes. The nonce is all of the header (direction, worker, epoch, chunk and
slot version are in it) and, where there is one, the bitmap: a retransmission is the same bytes, and no two messages of
an epoch share a nonce.
"""

import hmac

from trainkit.switchml._native import seal, unseal


def tagged(packet: bytes, key: bytes) -> bytes:
    """The packet with its tag; unchanged with an empty key."""
    return bytes(seal(packet, key)) if key else packet


def open_tagged(packet: bytes, key: bytes) -> bytes | None:
    """The packet without its tag; None where the tag is wrong, unchanged with an empty key."""
    return unseal(packet, key) if key else packet


def derived(token: bytes, salt: bytes, what: bytes, context: bytes) -> bytes:
    """A key of 32 bytes: HKDF-SHA256 (RFC 5869) of the token.

    Args:
        token: the shared secret; may be empty.
        salt: what the switch drew for this epoch.
        what: the key is for.
        context: all that the epoch's two sides have said of it.
    """
    extracted = hmac.digest(salt, token, "sha256")
    return hmac.digest(extracted, b"trainkit switchml " + what + b"\0" + context + b"\1", "sha256")
