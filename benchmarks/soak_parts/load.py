"""Users that send requests without pause; records tokens, differing answers and failures."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx

from benchmarks.soak_parts.mixture import PATH, Ask, Kind, draw

REQUEST_SECONDS = 300.0
MAX_KEPT_ERRORS = 20


@dataclass(slots=True)
class Load:
    url: str
    model: str
    concurrency: int
    seed: int = 0
    asked: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    compared: int = 0
    """Answers that were compared with an earlier one."""
    differing: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    failures: int = 0
    _first: dict[str, str] = field(default_factory=dict)

    async def run(self, seconds: float) -> None:
        """Run all users for `seconds`; returns when the last answer has ended."""
        ends = time.monotonic() + seconds
        self.seed += 1
        async with (
            httpx.AsyncClient(base_url=self.url, timeout=REQUEST_SECONDS) as client,
            asyncio.TaskGroup() as group,
        ):
            for user in range(self.concurrency):
                rng = random.Random(f"{self.seed}/{user}")
                group.create_task(self._user(client, rng, ends))

    async def _user(self, client: httpx.AsyncClient, rng: random.Random, ends: float) -> None:
        while time.monotonic() < ends:
            ask = draw(rng, self.model)
            self.asked[ask.kind.value] += 1
            try:
                await self._ask(client, ask)
            except httpx.HTTPError as error:
                self._failed(f"{ask.kind.value}: {type(error).__name__}: {error}")

    async def _ask(self, client: httpx.AsyncClient, ask: Ask) -> None:
        if ask.streams:
            async with client.stream("POST", PATH, json=ask.body) as response:
                if self._refused(ask, response):
                    return
                text = await self._read_events(response, ask)
        else:
            response = await client.post(PATH, json=ask.body)
            if self._refused(ask, response):
                return
            answer = response.json()
            self.tokens += answer["usage"]["completion_tokens"]
            text = answer["choices"][0]["message"]["content"]
        if text is not None and ask.repeats is not None:
            self._compare(ask.repeats, text)

    def _refused(self, ask: Ask, response: httpx.Response) -> bool:
        """Whether there is no answer to read; bad requests must get a 4xx status, all others 200."""
        if ask.kind is Kind.BAD:
            if not 400 <= response.status_code < 500:
                self._failed(f"a bad request was answered with {response.status_code}")
            return True
        if response.status_code != 200:
            self._failed(f"{ask.kind.value}: status {response.status_code}")
            return True
        return False

    async def _read_events(self, response: httpx.Response, ask: Ask) -> str | None:
        """The text; None when the client left early or the stream reported an error."""
        parts: list[str] = []
        events = 0
        if ask.cancel_after_events == 0:
            return None
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event: dict[str, Any] = json.loads(line.removeprefix("data: "))
            if "error" in event:
                self._failed(f"{ask.kind.value}: {event['error']['message']}")
                return None
            parts += [choice["delta"].get("content") or "" for choice in event.get("choices", ())]
            events += 1
            self.tokens += 1  # approximate: an event holds all tokens a round committed
            if events == ask.cancel_after_events:
                return None
        return "".join(parts)

    def _compare(self, name: str, text: str) -> None:
        known = self._first.setdefault(name, text)
        self.compared += known is not text
        if known != text and len(self.differing) < MAX_KEPT_ERRORS:
            self.differing.append(f"{name}: {known[:60]!r} and {text[:60]!r}")

    def _failed(self, what: str) -> None:
        self.failures += 1
        if len(self.errors) < MAX_KEPT_ERRORS:
            self.errors.append(what)
