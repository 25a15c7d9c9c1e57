"""Optional API keys, sent as `Authorization: Bearer ...`."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from services.gateway.http_errors import AuthenticationError


class ApiKeys:
    def __init__(self, keys: Sequence[str]) -> None:
        """No keys: everyone may call."""
        self._keys = [key.encode() for key in keys]

    def check(self, authorization: str | None) -> None:
        """authorization: the header's value.

        Raises:
            AuthenticationError: no key, or one that is not known. The key itself is not repeated.
        """
        if not self._keys:
            return
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("an API key is required: send it as 'Authorization: Bearer <key>'")
        given = key.strip().encode(errors="replace")
        # Every key is compared, in constant time, so that timing tells nothing about them.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        if not any(matches):
            raise AuthenticationError("the API key is not valid here")
