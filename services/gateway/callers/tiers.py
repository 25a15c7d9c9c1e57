"""Callers: the tier of an API key, and the speed floor that follows from body, header and tier."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from dspark_core.errors import ConfigError, InvalidRequestError
from dspark_core.records import check_speed_floor
from services.common.limits import MOST_TIERS
from services.gateway.callers.quotas import Account, Quota
from services.gateway.requests import DEFAULT_TIER_NAME, TextRequest

FLOOR_HEADER = "X-Min-Tokens-Per-Second"
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,31}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """What a class of callers is promised."""

    name: str = DEFAULT_TIER_NAME
    min_tokens_per_second: float | None = None
    """Floor promised to requests that ask for none, and the highest one may ask for. None: nothing is
    promised; a floor that a request asks for is a wish."""
    quota: Quota = field(default_factory=Quota)
    """Of each key."""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"tier names must be 1 to 32 lower-case letters, digits, - or _, got {self.name!r}"
            )
        try:
            check_speed_floor(self.min_tokens_per_second, f"the floor of tier {self.name}")
        except InvalidRequestError as error:
            raise ConfigError(str(error)) from None


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    tier: Tier = Tier()
    asked_floor: float | None = None
    """From the request header."""
    cache_domain: str = ""
    """Callers of different domains share no cached prompts."""
    account: Account = field(default_factory=Account)

    def sends(self, request: TextRequest) -> TextRequest:
        """The request under this caller's tier. The floor is the body's, else the header's, else the tier's.

        Raises InvalidRequestError naming the field for a floor above the tier's.
        """
        floor, name = request.min_tokens_per_second, request.floor_field
        if floor is None:
            floor, name = self.asked_floor, FLOOR_HEADER
        limit = self.tier.min_tokens_per_second
        if floor is not None and limit is not None and floor > limit:
            raise InvalidRequestError(
                f"{name} must be at most {limit:g}, the floor of tier {self.tier.name!r}, got {floor:g}",
                field=name,
            )
        if floor is None:
            floor, name = limit, None
        return replace(
            request,
            tier=self.tier.name,
            min_tokens_per_second=floor,
            floor_field=name,
            floor_promised=limit is not None,
            cache_domain=self.cache_domain,
        )


def floor_from_header(text: str | None) -> float | None:
    """Raises InvalidRequestError naming the header and its value."""
    if text is None or not text.strip():
        return None
    try:
        value = float(text)
    except ValueError:
        raise InvalidRequestError(
            f"{FLOOR_HEADER} must be a number, got {text!r:.80}", field=FLOOR_HEADER
        ) from None
    check_speed_floor(value, FLOOR_HEADER)
    return value


def check_number(tiers: Collection[str]) -> None:
    """Raises ConfigError for more than the scheduler can tell apart, the default one included."""
    if (number := len({DEFAULT_TIER_NAME, *tiers})) > MOST_TIERS:
        raise ConfigError(
            f"names {number} tiers, with {DEFAULT_TIER_NAME!r}, where {MOST_TIERS} are possible"
        )


def tiers_from_text(text: str) -> Mapping[str, Tier]:
    """`gold:30,silver:10` -> tiers by name; `default` is the tier of callers without another one."""
    tiers: dict[str, Tier] = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, floor = (piece.strip() for piece in part.partition(":")[::2])
        if name in tiers:
            raise ConfigError(f"DSPARK_TIERS names tier {name!r} more than once")
        try:
            tiers[name] = Tier(name=name, min_tokens_per_second=float(floor))
        except ConfigError as error:
            raise ConfigError(f"DSPARK_TIERS: {error}") from None
        except ValueError:
            raise ConfigError(
                f"DSPARK_TIERS must list tier:floor in tokens per second, got {part!r}"
            ) from None
    try:
        check_number(tiers)
    except ConfigError as error:
        raise ConfigError(f"DSPARK_TIERS {error}") from None
    return tiers
