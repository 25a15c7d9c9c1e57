"""Optional API keys, sent as `Authorization: Bearer ...`, and the caller that each stands for."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

from dspark_core.errors import AuthenticationError, ConfigError
from services.gateway.callers.quotas import Account
from services.gateway.callers.tiers import Caller, Tier, floor_from_header
from services.gateway.requests import DEFAULT_TIER_NAME


class PrefixSharing(Enum):
    """Which callers share cached prompts. Whoever shares can find out by timing what others have sent."""

    KEY = "key"
    """Those with the same key."""
    TIER = "tier"
    ALL = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class ApiKey:
    name: str
    """For the log; no secret."""
    digest: bytes = field(repr=False)
    """SHA-256 of the key."""
    tier: Tier = field(default_factory=Tier)


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="replace")).digest()


def split_key(entry: str) -> tuple[str, str]:
    """Splits an entry of DSPARK_API_KEYS into key and tier. A key may contain an @ if a tier follows it."""
    key, at, tier = entry.rpartition("@")
    return (key, tier or DEFAULT_TIER_NAME) if at else (entry, DEFAULT_TIER_NAME)


def keys_of(entries: Sequence[str], tiers: Mapping[str, Tier]) -> list[ApiKey]:
    """entries: `key` or `key@tier`. Raises ConfigError for an unknown tier or a key given twice."""
    keys: dict[bytes, ApiKey] = {}
    for position, entry in enumerate(entries, start=1):
        key, name = split_key(entry)
        if name not in tiers:
            # The entry is secret, and what follows its @ may be part of the key: name it by position.
            raise ConfigError(
                f"DSPARK_API_KEYS entry {position} names a tier, after its last @, not in DSPARK_TIERS "
                f"(known: {', '.join(sorted(tiers))})"
            )
        digest = digest_of(key)
        if digest in keys:
            first = keys[digest].name.removeprefix("key-")
            raise ConfigError(f"DSPARK_API_KEYS entries {first} and {position} are the same key")
        keys[digest] = ApiKey(name=f"key-{position}", digest=digest, tier=tiers[name])
    return list(keys.values())


class ApiKeys:
    def __init__(
        self,
        entries: Sequence[str],
        tiers: Mapping[str, Tier] | None = None,
        sharing: PrefixSharing = PrefixSharing.KEY,
    ) -> None:
        """entries: as for `keys_of`; none: everyone may call, and all share cached prompts."""
        known = {DEFAULT_TIER_NAME: Tier(), **(tiers or {})}
        self._default = known[DEFAULT_TIER_NAME]
        self._sharing = sharing
        self._accounts: dict[str, Account] = {}
        self.use(keys_of(entries, known))

    def use(self, keys: Sequence[ApiKey]) -> None:
        """Replaces the keys. What was used under a name counts on, also when its key was replaced."""
        # Found by their digests, so the time it takes reveals nothing about keys.
        self._keys = {key.digest: key for key in keys}
        accounts = {key.name: self._accounts.get(key.name) or Account(key.name) for key in keys}
        for key in keys:
            accounts[key.name].hold_to(key.tier.quota)
        self._accounts = accounts

    def caller_of(self, authorization: str | None, floor: str | None = None) -> Caller:
        """Both are headers' values.

        Raises:
            AuthenticationError: no key, or an unknown one. The message does not repeat the key.
            InvalidRequestError: `floor` is none.
        """
        if not self._keys:
            return Caller(tier=self._default, asked_floor=floor_from_header(floor))
        key = self._known(authorization)
        return Caller(
            tier=key.tier,
            asked_floor=floor_from_header(floor),
            cache_domain=self._domain(key),
            account=self._accounts[key.name],
        )

    def _known(self, authorization: str | None) -> ApiKey:
        scheme, _, text = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not text.strip():
            raise AuthenticationError("an API key is required: send it as 'Authorization: Bearer <key>'")
        key = self._keys.get(digest_of(text.strip()))
        if key is None:
            raise AuthenticationError("the API key is not valid here")
        return key

    def _domain(self, key: ApiKey) -> str:
        """The same at every gateway, and no secret: verifiers are told of it."""
        match self._sharing:
            case PrefixSharing.KEY:
                return hashlib.blake2b(key.digest, digest_size=16, person=b"dspark cache").hexdigest()
            case PrefixSharing.TIER:
                return f"tier {key.tier.name}"
            case PrefixSharing.ALL:
                return ""
