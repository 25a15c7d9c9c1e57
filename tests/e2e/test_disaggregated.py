"""Four real processes on loopback produce the same tokens as embedded, even if drafter or scheduler are
killed.

They use mutual TLS, unlike the processes of other tests.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from services.embedded.processes import ProcessStack
from services.embedded.stack import EmbeddedStack
from tests.e2e.conftest import OPTIONS
from tests.support.certificates import tls_environ, write_tls
from tests.support.ports import free_ports

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(400)]

MODEL = "smollm2-135m-instruct"
ASKED = [
    {"content": "Write a short poem about the sea.", "temperature": 0},
    {"content": "Describe a day in a small village.", "temperature": 0.9, "seed": 11},
    {"content": "List some fruits.", "temperature": 1.0, "top_p": 0.8, "seed": 12},
]


@pytest.fixture
async def processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> AsyncIterator[tuple[ProcessStack, str]]:
    monkeypatch.setenv("PYTHONPATH", ".:proto/gen")
    monkeypatch.setenv("DSPARK_COHORTS", "2")  # two requests take turns
    for name, value in tls_environ(write_tls(tmp_path)).items():
        monkeypatch.setenv(name, value)
    http_port, grpc_port = free_ports(2)
    options = dataclasses.replace(OPTIONS, http_port=http_port, grpc_port=grpc_port, threads=1)
    one = ProcessStack(options)
    try:
        await one.start()
        yield one, options.url
    finally:
        await one.stop()


def body(asked: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    fields = {key: value for key, value in asked.items() if key != "content"}
    messages = [{"role": "user", "content": asked["content"]}]
    return {"model": MODEL, "messages": messages, "max_tokens": max_tokens, **fields}


async def answer(url: str, asked: dict[str, Any], max_tokens: int = 24) -> str:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        response = await client.post("/v1/chat/completions", json=body(asked, max_tokens))
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["message"]["content"])


async def events(url: str, asked: dict[str, Any], max_tokens: int) -> AsyncIterator[dict[str, Any]]:
    async with (
        httpx.AsyncClient(base_url=url, timeout=120) as client,
        client.stream(
            "POST", "/v1/chat/completions", json={**body(asked, max_tokens), "stream": True}
        ) as response,
    ):
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                yield json.loads(line.removeprefix("data: "))


async def test_processes_answer_like_the_embedded_stack_and_survive_their_drafter(
    processes: tuple[ProcessStack, str], stack: EmbeddedStack
) -> None:
    one, url = processes
    expected = [await answer(stack.url, asked) for asked in ASKED]
    assert [await answer(url, asked) for asked in ASKED] == expected
    assert await asyncio.gather(*(answer(url, asked) for asked in ASKED)) == expected

    # Kill -9 the drafter in the middle of a stream, beside another: plain decoding continues with the same
    # tokens.
    beside = asyncio.create_task(answer(url, ASKED[2], 48))
    for asked in (ASKED[0], ASKED[1]):
        whole = await answer(stack.url, asked, 48)
        pieces, speculation = [], {}
        async for event in events(url, asked, 48):
            if event["choices"]:
                pieces.append(event["choices"][0]["delta"].get("content") or "")
            speculation = event.get("speculation") or speculation
            if len(pieces) == 5 and one.processes["drafter"].exit_code is None:
                one.processes["drafter"].kill()
        assert "".join(pieces) == whole
        assert speculation["rounds"] > 0
    assert await beside == await answer(stack.url, ASKED[2], 48)
    assert one.processes["drafter"].exit_code is not None

    # Kill -9 the scheduler in the middle of a stream: the same tokens, and the next request is served.
    pieces = []
    async for event in events(url, ASKED[1], 48):
        if event["choices"]:
            pieces.append(event["choices"][0]["delta"].get("content") or "")
        if len(pieces) == 5 and one.processes["scheduler"].exit_code is None:
            one.processes["scheduler"].kill()
    assert "".join(pieces) == await answer(stack.url, ASKED[1], 48)
    assert one.processes["scheduler"].exit_code is not None
    assert await answer(url, ASKED[2]) == await answer(stack.url, ASKED[2])

    # SIGTERM: all remaining processes exit cleanly by themselves.
    await asyncio.wait_for(one.stop(), 60)
    killed = ("drafter", "scheduler")
    codes = {role: process.exit_code for role, process in one.processes.items() if role not in killed}
    assert codes == {"gateway": 0, "verifier": 0}
