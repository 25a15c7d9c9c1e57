"""Speculation changes speed, never tokens: tested over HTTP with the shipped drafter in float32.

Here the planner decides what is verified; `test_lossless_forced` verifies every draft.
"""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest

from services.embedded.stack import EmbeddedStack
from tests.e2e.prompts import PROMPTS

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(400)]

CONCURRENCY = 16


async def complete(client: httpx.AsyncClient, prompt: str, **fields: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 16, **fields}
    response = await client.post("/v1/chat/completions", json={"model": "smollm2-135m-instruct", **body})
    assert response.status_code == 200, response.text
    return response.json()


async def complete_all(url: str, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    gate = asyncio.Semaphore(CONCURRENCY)
    async with httpx.AsyncClient(base_url=url, timeout=300) as client:

        async def one(fields: dict[str, Any]) -> dict[str, Any]:
            async with gate:
                return await complete(client, **fields)

        return await asyncio.gather(*(one(fields) for fields in asked))


def text_of(answer: dict[str, Any]) -> tuple[str, str, int]:
    choice = answer["choices"][0]
    return choice["message"]["content"], choice["finish_reason"], answer["usage"]["completion_tokens"]


async def compare(stack: EmbeddedStack, **sampling: Any) -> list[dict[str, Any]]:
    """Compares the answers to all prompts with and without speculation; returns those with it."""
    fast = [{"prompt": prompt, **sampling} for prompt in PROMPTS]
    plain = [{**fields, "speculation": {"enabled": False}} for fields in fast]
    with_drafts, without = await complete_all(stack.url, fast), await complete_all(stack.url, plain)
    assert [text_of(answer) for answer in with_drafts] == [text_of(answer) for answer in without]
    assert sum(answer["speculation"]["drafted_tokens"] for answer in without) == 0
    return with_drafts


async def test_greedy_output_is_the_same_with_and_without_speculation(stack: EmbeddedStack) -> None:
    answers = await compare(stack, temperature=0)
    # Not vacuous: drafts were accepted, and answers differ from each other.
    assert sum(answer["speculation"]["accepted_tokens"] for answer in answers) > 0
    assert len({text_of(answer)[0] for answer in answers}) > 40


async def test_seeded_output_is_the_same_with_and_without_speculation(stack: EmbeddedStack) -> None:
    answers = await compare(stack, temperature=0.8, top_p=0.95, seed=1234)
    assert sum(answer["speculation"]["drafted_tokens"] for answer in answers) > 0
