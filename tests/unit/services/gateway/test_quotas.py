"""What one key may use."""

import math

import pytest

from dspark_core.errors import ConfigError, QuotaError
from services.gateway.assembly import Usage
from services.gateway.callers.quotas import RATE_LIMIT_HEADERS, Account, Meter, Quota
from tests.support.clock import ManualClock


def _account(clock: ManualClock | None = None, **quota: int) -> Account:
    return Account("k", Quota(**quota), clock or ManualClock())


def test_without_a_quota_everything_is_let_in_and_nothing_told() -> None:
    account = _account()
    account.enter(10_000)
    account.charge(10**9)
    account.enter(1)
    assert account.headers() == {}
    assert account.max_at_once == math.inf


def test_requests_at_a_time_are_bounded_until_they_leave() -> None:
    account = _account(max_concurrent_requests=3)
    account.enter(2)
    with pytest.raises(QuotaError, match="2 requests running or waiting; its max_concurrent_requests is 3"):
        account.enter(2)
    account.enter(1)
    account.leave(2)
    account.enter(2)


def test_requests_of_a_minute_come_back_evenly_and_a_refusal_says_when() -> None:
    clock = ManualClock()
    account = _account(clock, requests_per_minute=6)
    account.enter(6)
    with pytest.raises(QuotaError, match=r"requests_per_minute of 6; retry in 20.0 s") as caught:
        account.enter(2)
    assert (caught.value.quota, caught.value.retry_after_seconds) == ("requests_per_minute", 20.0)
    clock.advance(20.0)
    account.enter(2)
    clock.advance(3600.0)
    assert account.headers()["x-ratelimit-remaining-requests"] == "6"


def test_requests_refused_elsewhere_cost_nothing() -> None:
    account = _account(requests_per_minute=6, max_concurrent_requests=6)
    account.enter(6)
    account.give_back(6)
    account.leave(6)
    account.enter(6)


def test_tokens_may_be_overdrawn_and_then_have_to_come_back() -> None:
    clock = ManualClock()
    account = _account(clock, tokens_per_minute=60)
    account.enter(1)
    account.charge(90)
    with pytest.raises(QuotaError, match="tokens_per_minute of 60") as caught:
        account.enter(1)
    assert caught.value.retry_after_seconds == pytest.approx(31.0)
    assert account.headers() == {
        "x-ratelimit-limit-tokens": "60",
        "x-ratelimit-remaining-tokens": "0",
        "x-ratelimit-reset-tokens": "90.000s",
    }
    assert set(account.headers()) < set(RATE_LIMIT_HEADERS)
    clock.advance(31.0)
    account.enter(1)


def test_a_meter_charges_each_prompt_once_and_each_token_once() -> None:
    account = _account(tokens_per_minute=1000)
    meter = Meter(account, 2)
    for choice, completion in ((0, 3), (1, 1), (0, 5), (2, 0), (3, 4)):
        prompt = 100 if choice < 2 else 10
        meter.add(choice, Usage(prompt_tokens=prompt, completion_tokens=completion))
    assert account.headers()["x-ratelimit-remaining-tokens"] == str(1000 - 100 - 10 - 5 - 1 - 4)


def test_a_changed_quota_applies_to_what_was_used() -> None:
    account = _account(requests_per_minute=10, max_concurrent_requests=10)
    account.enter(4)
    account.hold_to(Quota(requests_per_minute=3, max_concurrent_requests=4))
    with pytest.raises(QuotaError, match="4 requests running"):
        account.enter(1)
    account.leave(4)
    account.enter(3)
    account.hold_to(Quota(requests_per_minute=100))
    assert account.max_at_once == 100
    account.enter(97)
    with pytest.raises(QuotaError):
        account.enter(1)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "8"])
def test_quotas_are_whole_numbers(value) -> None:
    with pytest.raises(ConfigError, match="tokens_per_minute must be a whole number >= 1, got"):
        Quota(tokens_per_minute=value)
