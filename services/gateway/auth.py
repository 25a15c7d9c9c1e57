"""Optional API keys, sent as `Authorization: Bearer ...`, and the tier each belongs to."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence

from dspark_core.errors import AuthenticationError, ConfigError
from services.gateway.requests import DEFAULT_TIER_NAME
from services.gateway.tiers import Tier


def split_key(entry: str) -> tuple[str, str]:
    """Splits an entry of DSPARK_API_KEYS into key and tier. A key may contain an @ if a tier follows it."""
    key, at, tier = entry.rpartition("@")
    return (key, tier or DEFAULT_TIER_NAME) if at else (entry, DEFAULT_TIER_NAME)


class ApiKeys:
    def __init__(self, keys: Sequence[str], tiers: Mapping[str, Tier] | None = None) -> None:
        """keys: `key` or `key@tier`; none: everyone may call. Raises ConfigError for an unknown tier."""
        known = {DEFAULT_TIER_NAME: Tier(), **(tiers or {})}
        self._default = known[DEFAULT_TIER_NAME]
        self._keys: list[tuple[bytes, Tier]] = []
        for position, entry in enumerate(keys, start=1):
            key, name = split_key(entry)
            if name not in known:
                # The entry is secret, and what follows its @ may be part of the key: name it by position.
                raise ConfigError(
                    f"DSPARK_API_KEYS entry {position} names a tier, after its last @, not in DSPARK_TIERS "
                    f"(known: {', '.join(sorted(known))})"
                )
            self._keys.append((key.encode(), known[name]))

    def tier_of(self, authorization: str | None) -> Tier:
        """authorization: the header's value.

        Raises:
            AuthenticationError: no key, or an unknown one. The message does not repeat the key.
        """
        if not self._keys:
            return self._default
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("an API key is required: send it as 'Authorization: Bearer <key>'")
        given = key.strip().encode(errors="replace")
        # Compare with every key, in constant time, so that timing reveals nothing about them.
        matches = [tier for known, tier in self._keys if hmac.compare_digest(given, known)]
        if not matches:
            raise AuthenticationError("the API key is not valid here")
        return matches[0]
