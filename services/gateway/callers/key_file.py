"""Keys and tiers from a TOML file, read again when it changes.

[tiers.gold]
min_tokens_per_second = 30
max_concurrent_requests = 8

[keys.alice]
key = "sha256:..."
tier = "gold"
"""

from __future__ import annotations

import asyncio
import logging
import re
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from dspark_core.errors import ConfigError
from services.gateway.callers.auth import ApiKey, digest_of
from services.gateway.callers.quotas import Quota
from services.gateway.callers.tiers import Tier, check_number
from services.gateway.requests import DEFAULT_TIER_NAME

_log = logging.getLogger(__name__)

SETTING = "DSPARK_KEYS_FILE"
RELOAD_SECONDS = 2.0
_DIGEST = re.compile(r"sha256:([0-9a-fA-F]{64})")
_NAME = re.compile(r"[\x21-\x7e]{1,64}")
_QUOTAS = tuple(field.name for field in fields(Quota))


class KeyFile:
    """Run `keep` as a task."""

    def __init__(self, path: str, use: Callable[[Sequence[ApiKey]], None]) -> None:
        """use: is given the keys, now and after each change. Raises ConfigError if the file is wrong now."""
        self._path = path
        self._use = use
        self._text = self._last_read = _read(path)
        self._problem: str | None = None
        use(parse_keys(self._text))

    async def keep(self, interval_seconds: float = RELOAD_SECONDS) -> None:
        """Until cancelled. A file that became wrong changes nothing, nor does one that is still being written
        (half of it may be right, with fewer keys): two readings must agree.
        """
        while True:
            await asyncio.sleep(interval_seconds)
            try:
                text = await asyncio.to_thread(_read, self._path)
                if text != self._last_read:
                    self._last_read = text
                    continue
                keys = parse_keys(text) if text != self._text else None
            except ConfigError as error:
                if str(error) != self._problem:  # once, not every two seconds
                    _log.warning("keys and tiers stay as they are: %s", error)
                self._problem = str(error)
                continue
            self._problem = None
            if keys is not None:
                self._text = text
                self._use(keys)
                _log.info("read %d keys again", len(keys))


def read_keys(path: str) -> tuple[ApiKey, ...]:
    """Raises ConfigError, which shows no key."""
    return parse_keys(_read(path))


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{SETTING} {path!r} cannot be read: {error}") from None


def parse_keys(text: str) -> tuple[ApiKey, ...]:
    """Raises ConfigError, which shows no key."""
    try:
        document = tomllib.loads(text)
        _only(document, ("tiers", "keys"), "the file")
        tiers = {
            name: _tier(name, _table(values, f"[tiers.{name}]"))
            for name, values in _table(document.get("tiers", {}), "[tiers]").items()
        }
        check_number(tiers)
        known = {DEFAULT_TIER_NAME: Tier(), **tiers}
        entries = _table(document.get("keys", {}), "[keys]").items()
        # By position: a key may have been written where its name belongs.
        tables = [
            (name, _table(value, f"entry {at} of [keys]")) for at, (name, value) in enumerate(entries, 1)
        ]
        keys = tuple(_key(name, values, known) for name, values in tables)
        if not keys:  # keys were intended: do not leave the gateway open
            raise ConfigError("holds no [keys.NAME]")
        if len({key.digest for key in keys}) < len(keys):
            raise ConfigError("holds the same key under two names")
    except (ValueError, RecursionError, ConfigError) as error:  # the first also for a number of 5,000 digits
        raise ConfigError(f"{SETTING}: {error}") from None
    return keys


def _table(value: object, place: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise ConfigError(f"{place} must be a table")
    return value


def _only(values: Mapping[str, Any], names: Sequence[str], place: str) -> None:
    for name in values:
        if name not in names:
            raise ConfigError(f"{place} must hold {', '.join(names)} only, got {name!r:.40}")


def _tier(name: str, values: Mapping[str, Any]) -> Tier:
    _only(values, ("min_tokens_per_second", *_QUOTAS), f"[tiers.{name}]")
    floor = values.get("min_tokens_per_second")
    if floor is not None and (isinstance(floor, bool) or not isinstance(floor, int | float)):
        raise ConfigError(f"[tiers.{name}] min_tokens_per_second must be a number, got {floor!r}")
    try:
        quota = Quota(**{quota: values[quota] for quota in _QUOTAS if quota in values})
    except ConfigError as error:
        raise ConfigError(f"[tiers.{name}] {error}") from None
    return Tier(name=name, min_tokens_per_second=floor, quota=quota)


def _key(name: str, values: Mapping[str, Any], tiers: Mapping[str, Tier]) -> ApiKey:
    place = f"[keys.{name}]"
    if not _NAME.fullmatch(name):
        raise ConfigError(f"names of keys must be 1 to 64 visible ASCII characters, got {name!r:.80}")
    _only(values, ("key", "tier"), place)
    text, tier = values.get("key"), values.get("tier", DEFAULT_TIER_NAME)
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{place} must hold key, a text: the key itself or sha256:HEX")
    if not isinstance(tier, str) or tier not in tiers:
        raise ConfigError(f"{place} names an unknown tier (known: {', '.join(sorted(tiers))})")
    hashed = _DIGEST.fullmatch(text.strip())
    if hashed is None and text.strip().startswith("sha256:"):
        raise ConfigError(f"{place} key must have 64 hexadecimal digits after sha256:")
    digest = bytes.fromhex(hashed[1]) if hashed else digest_of(text.strip())
    return ApiKey(name=name, digest=digest, tier=tiers[tier])
