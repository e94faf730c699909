"""Proof that a worker is where its packets say: a cookie that the switch makes and forgets.

As QUIC's Retry (RFC 9000, section 8.1.2): whoever asks from an address that is not his never sees the answer, so that
no state is made and hardly a byte is sent for him.
"""

import hmac
import secrets

from trainkit.switchml._membership import Address

_LIFE_MS = 30_000


class Cookies:
    """Makes cookies and knows its own."""

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)

    def made(self, source: Address, of: str, now: float) -> str:
        """A cookie for `source`.

        Args:
            source: where the question came from.
            of: what it is for: the nonce of a join, or an epoch and a rank.
            now: seconds.
        """
        return self._of(source, of, int(now * 1000))

    def age(self, cookie: object, source: Address, of: str, now: float) -> float | None:
        """When the cookie was made, in seconds; None where it was not made here for this source and purpose, or is old."""
        if not isinstance(cookie, str) or len(cookie) != 44 or not cookie.isascii():
            return None
        try:
            made = int(cookie[:12], 16)
        except ValueError:
            return None
        if not 0 <= int(now * 1000) - made <= _LIFE_MS:
            return None
        return made / 1000 if hmac.compare_digest(cookie, self._of(source, of, made)) else None

    def _of(self, source: Address, of: str, made: int) -> str:
        said = f"{made:012x} {of} {source!r}".encode()
        return f"{made:012x}" + hmac.digest(self._secret, said, "sha256").hex()[:32]
