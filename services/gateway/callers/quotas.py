"""What one key may use: requests at a time, requests and tokens per minute.

Counted in memory, by each gateway process for itself.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from dspark_core.errors import ConfigError, QuotaError
from services.gateway.assembly import Usage

MINUTE_SECONDS = 60.0
MAX_LIMIT = 10**12
"""Of a quota: more is a mistake, and much more is no float."""
CONCURRENCY_RETRY_SECONDS = 1.0
"""When a running request ends is unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Quota:
    """Limits of each key of a tier; None: no limit. Every answer counts as a request."""

    max_concurrent_requests: int | None = None
    """Running and waiting at one gateway."""
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    """Of prompts, cached or not, and of answers."""

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ConfigError(f"{name} must be a whole number >= 1, got {value!r}")
            if value > MAX_LIMIT:
                raise ConfigError(f"{name} must be a whole number <= {MAX_LIMIT}, got one of more digits")


RATE_LIMIT_HEADERS = tuple(
    f"x-ratelimit-{what}-{kind}"
    for kind in ("requests", "tokens")
    for what in ("limit", "remaining", "reset")
)


class _Bucket:
    """Holds what a minute allows, is full at first and refills evenly. It can be overdrawn: how long an
    answer gets is known only at its end."""

    def __init__(self, per_minute: int, level: float, now: float) -> None:
        self.per_minute = per_minute
        self._level = level
        self._at = now

    def level(self, now: float) -> float:
        gained = (now - self._at) * self.per_minute / MINUTE_SECONDS
        return min(self._level + gained, float(self.per_minute))

    def take(self, amount: float, now: float) -> None:
        self._level, self._at = self.level(now) - amount, now

    def seconds_until(self, level: float, now: float) -> float:
        return max(0.0, level - self.level(now)) * MINUTE_SECONDS / self.per_minute


class Account:
    """What one key uses, and the quota it is held to. For use on one event loop."""

    def __init__(
        self, name: str = "", quota: Quota | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.name = name
        self._clock = clock
        self._running = 0
        self._buckets: dict[str, _Bucket] = {}
        self.hold_to(quota or Quota())

    def hold_to(self, quota: Quota) -> None:
        """What was used counts on, but a lower limit does not make a debt of it."""
        self._quota, now = quota, self._clock()
        before, self._buckets = self._buckets, {}
        limits = {"requests": quota.requests_per_minute, "tokens": quota.tokens_per_minute}
        for kind, limit in limits.items():
            if limit is None:
                continue
            level: float = limit
            if kind in before:
                raised_by = max(0, limit - before[kind].per_minute)
                level = before[kind].level(now) + raised_by
            self._buckets[kind] = _Bucket(limit, level, now)

    @property
    def max_at_once(self) -> float:
        """More requests than this can never enter together."""
        limits = (self._quota.max_concurrent_requests, self._quota.requests_per_minute)
        return min((limit for limit in limits if limit is not None), default=math.inf)

    def enter(self, count: int) -> None:
        """Admits `count` requests, at most `max_at_once`, or none; `leave` must follow.

        Raises QuotaError if they would exceed the quota now.
        """
        now, most = self._clock(), self._quota.max_concurrent_requests
        if most is not None and self._running + count > most:
            raise QuotaError(
                f"this key has {self._running} requests running or waiting; its max_concurrent_requests is "
                f"{most}",
                quota="max_concurrent_requests",
                retry_after_seconds=CONCURRENCY_RETRY_SECONDS,
            )
        for kind, needed in (("requests", count), ("tokens", 1)):
            bucket = self._buckets.get(kind)
            if bucket is not None and (wait_seconds := bucket.seconds_until(needed, now)) > 0:
                raise QuotaError(
                    f"this key has used its {kind}_per_minute of {bucket.per_minute}; "
                    f"retry in {wait_seconds:.1f} s",
                    quota=f"{kind}_per_minute",
                    retry_after_seconds=wait_seconds,
                )
        self._running += count
        self._take("requests", count)

    def leave(self, count: int) -> None:
        self._running -= count

    def give_back(self, count: int) -> None:
        """Requests that were refused elsewhere do not count as used; they still have to leave."""
        self._take("requests", -count)

    def charge(self, tokens: int) -> None:
        self._take("tokens", tokens)

    def headers(self) -> dict[str, str]:
        """OpenAI's: limit, what remains, and the time until all of it is there again."""
        now, headers = self._clock(), {}
        for kind, bucket in self._buckets.items():
            headers[f"x-ratelimit-limit-{kind}"] = str(bucket.per_minute)
            headers[f"x-ratelimit-remaining-{kind}"] = str(max(0, int(bucket.level(now))))
            headers[f"x-ratelimit-reset-{kind}"] = f"{bucket.seconds_until(bucket.per_minute, now):.3f}s"
        return headers

    def _take(self, kind: str, amount: float) -> None:
        if kind in self._buckets:
            self._buckets[kind].take(amount, self._clock())


class Meter:
    """Charges an account for the answers to one client request as their tokens arrive."""

    def __init__(self, account: Account, choices_per_prompt: int) -> None:
        self._account = account
        self._per_prompt = choices_per_prompt
        self._prompts: set[int] = set()
        self._completion_tokens: dict[int, int] = {}

    def add(self, choice: int, usage: Usage) -> None:
        """`usage`: of the choice so far."""
        tokens = usage.completion_tokens - self._completion_tokens.get(choice, 0)
        self._completion_tokens[choice] = usage.completion_tokens
        prompt = choice // self._per_prompt
        if prompt not in self._prompts:
            self._prompts.add(prompt)
            tokens += usage.prompt_tokens
        self._account.charge(tokens)
