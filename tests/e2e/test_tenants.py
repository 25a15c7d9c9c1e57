"""What keys have of their own over HTTP on the real stack.

Speed floors are refused if out of reach, otherwise reported, and protected if the key's tier promises them.
Cached prompts are each key's own.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from services.gateway.callers.tiers import tiers_from_text
from services.gateway.config import GatewayConfig
from tests.e2e.conftest import running_stack

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(400)]

CHAT = "/v1/chat/completions"


STORY = "Write a long story about a village by the sea."
ENDLESS = {
    "model": "smollm2-135m-instruct",
    "prompt": "One, two, three. " * 10,
    "temperature": 0,
    "max_tokens": 4000,
    "stream": True,
}
"""Text that the model repeats up to the token limit; a chat answer would end by itself."""


def body(max_tokens: int = 32, **fields: Any) -> dict[str, Any]:
    return {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": STORY}],
        "temperature": 0,
        "max_tokens": max_tokens,
        **fields,
    }


GOLD, PLAIN, OTHER = ({"Authorization": f"Bearer {key}"} for key in ("g", "p", "q"))


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    """Calls with the key of a tier that promises any floor, unless told otherwise."""
    keys = GatewayConfig(api_keys=("g@gold", "p", "q"), tiers=tiers_from_text("gold:1e6"))
    with (
        running_stack(keys) as stack,
        httpx.Client(base_url=stack.url, timeout=120, headers=GOLD) as client,
    ):
        yield client


def expected_speed(client: httpx.Client) -> float:
    """The speed the scheduler expects for a lone request, as its refusal of an impossible floor states it."""
    refused = client.post(CHAT, json=body(min_tokens_per_second=1e6))
    assert refused.status_code == 400, refused.text
    error = refused.json()["error"]
    assert error["param"] == "min_tokens_per_second"
    found = re.search(r"got 1e\+06: a single request gets about ([0-9.]+) here", error["message"])
    assert found, error["message"]
    return float(found[1])


def test_an_impossible_floor_is_refused_and_a_modest_one_held_and_told(client: httpx.Client) -> None:
    floor = 0.05 * expected_speed(client)  # and a busy machine may be slower than expected
    answer = client.post(CHAT, json=body(min_tokens_per_second=floor))
    assert answer.status_code == 200, answer.text
    speculation = answer.json()["speculation"]
    assert speculation["min_tokens_per_second"] == pytest.approx(floor)
    assert speculation["decode_tokens_per_second"] >= floor
    assert 'dspark_gateway_speed_floors_total{held="yes",tier="gold"}' in client.get("/metrics").text


def test_a_floor_that_company_would_break_is_told_when_to_come_back(client: httpx.Client) -> None:
    with running_stream(client):
        refused = demand(client, wanted=429)
        assert int(refused.headers["Retry-After"]) >= 1
        assert "speed floor" in refused.json()["error"]["message"]
    # Alone it is served at the best possible speed.
    demand(client, wanted=200)


def test_a_wish_of_a_tier_without_floors_keeps_nobody_out(client: httpx.Client) -> None:
    wish = 0.5 * expected_speed(client)
    with (
        running_stream(client, min_tokens_per_second=wish),
        running_stream(client, min_tokens_per_second=wish),
        running_stream(client, min_tokens_per_second=wish),
    ):
        for _ in range(5):
            answer = client.post(CHAT, json=body(4, min_tokens_per_second=wish), headers=PLAIN)
            assert answer.status_code == 200, answer.text
            assert answer.json()["speculation"]["min_tokens_per_second"] == pytest.approx(wish)
    assert 'dspark_gateway_speed_floors_total{held="yes",tier="default"}' not in client.get("/metrics").text


def test_cached_prompts_are_a_keys_own_and_change_no_token(client: httpx.Client) -> None:
    asked = body(8, messages=[{"role": "user", "content": "The merger is to be announced on Friday. " * 20}])
    answers = [
        client.post(CHAT, json={**asked, **salt}, headers=key).json()
        for key, salt in (
            (PLAIN, {}),
            (PLAIN, {}),
            (OTHER, {}),
            (OTHER, {"cache_salt": "x"}),
            (OTHER, {"cache_salt": "x"}),
            (PLAIN, {"cache_salt": "x"}),
        )
    ]
    usages = [answer["usage"] for answer in answers]
    # All chats begin alike, so a key's first question may find a few tokens of its earlier ones.
    cached = [one["prompt_tokens_details"]["cached_tokens"] > one["prompt_tokens"] / 2 for one in usages]
    assert cached == [False, True, False, False, True, False]
    assert len({answer["choices"][0]["message"]["content"] for answer in answers}) == 1


@contextmanager
def running_stream(client: httpx.Client, **fields: Any) -> Iterator[None]:
    """A long stream of a key without a promise, which has begun."""
    sent = client.stream("POST", "/v1/completions", json={**ENDLESS, **fields}, headers=PLAIN)
    with sent as running:
        assert running.status_code == 200
        lines = running.iter_lines()  # keep a reference: httpx hangs up when its iterator is collected
        next(lines)
        yield


def demand(client: httpx.Client, wanted: int) -> httpx.Response:
    """Requests a floor above what each of two requests gets, but below what is refused at once. Retries until
    the answer has the wanted status: expected speeds change with every round, and by much on a busy
    machine."""
    deadline = time.monotonic() + 30
    while True:
        response = client.post(CHAT, json=body(4, min_tokens_per_second=1.8 * expected_speed(client)))
        if response.status_code == wanted or time.monotonic() > deadline:
            assert response.status_code == wanted, response.text
            return response
