"""Optional API keys, sent as `Authorization: Bearer ...`, and the tier each belongs to."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping, Sequence
from enum import Enum

from dspark_core.errors import AuthenticationError, ConfigError
from services.gateway.requests import DEFAULT_TIER_NAME
from services.gateway.tiers import Caller, Tier, floor_from_header


class PrefixSharing(Enum):
    """Which callers share cached prompts. Whoever shares can find out by timing what others have sent."""

    KEY = "key"
    """Those with the same key."""
    TIER = "tier"
    ALL = "all"


def split_key(entry: str) -> tuple[str, str]:
    """Splits an entry of DSPARK_API_KEYS into key and tier. A key may contain an @ if a tier follows it."""
    key, at, tier = entry.rpartition("@")
    return (key, tier or DEFAULT_TIER_NAME) if at else (entry, DEFAULT_TIER_NAME)


class ApiKeys:
    def __init__(
        self,
        keys: Sequence[str],
        tiers: Mapping[str, Tier] | None = None,
        sharing: PrefixSharing = PrefixSharing.KEY,
    ) -> None:
        """keys: `key` or `key@tier`; none: everyone may call, and all share cached prompts.

        Raises ConfigError for an unknown tier.
        """
        known = {DEFAULT_TIER_NAME: Tier(), **(tiers or {})}
        self._default = known[DEFAULT_TIER_NAME]
        self._sharing = sharing
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

    def caller_of(self, authorization: str | None, floor: str | None = None) -> Caller:
        """Both are headers' values.

        Raises:
            AuthenticationError: no key, or an unknown one. The message does not repeat the key.
            InvalidRequestError: `floor` is none.
        """
        if not self._keys:
            return Caller(tier=self._default, asked_floor=floor_from_header(floor))
        key, tier = self._known(authorization)
        return Caller(tier=tier, asked_floor=floor_from_header(floor), cache_domain=self._domain(key, tier))

    def _known(self, authorization: str | None) -> tuple[bytes, Tier]:
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise AuthenticationError("an API key is required: send it as 'Authorization: Bearer <key>'")
        given = key.strip().encode(errors="replace")
        # Compare with every key, in constant time, so that timing reveals nothing about them.
        matches = [(known, tier) for known, tier in self._keys if hmac.compare_digest(given, known)]
        if not matches:
            raise AuthenticationError("the API key is not valid here")
        return matches[0]

    def _domain(self, key: bytes, tier: Tier) -> str:
        """The same at every gateway, and no secret: verifiers are told of it."""
        match self._sharing:
            case PrefixSharing.KEY:
                return hashlib.blake2b(key, digest_size=16, person=b"dspark cache").hexdigest()
            case PrefixSharing.TIER:
                return f"tier {tier.name}"
            case PrefixSharing.ALL:
                return ""
