"""Streams requests to a gateway and records the results: tokens over time, answers by prompt."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import grpc.aio
from dspark_proto.v1 import gateway_pb2, gateway_pb2_grpc

PROMPTS = (
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "List five fruits and their colours.",
    "What is 17 times 23? Show the steps.",
    "Explain recursion to a child.",
    "Name the planets of the solar system in order.",
    "Write a Python function that reverses a list.",
    "Give three tips for better sleep.",
    "Who was Marie Curie?",
    "Translate 'good morning' into French and Spanish.",
    "Describe a day in a small village.",
    "What does a compiler do?",
)
REQUEST_SECONDS = 120.0


@dataclass(slots=True)
class Load:
    """Sends `concurrency` requests at a time, cycling through the prompts, until stopped."""

    address: str
    concurrency: int
    max_tokens: int
    temperature: float = 0.0
    ignore_eos: bool = False
    """Every answer has `max_tokens` tokens."""
    lookup: bool = True
    """Whether looked-up drafts may be used."""
    prompts: tuple[str, ...] = PROMPTS
    answers: defaultdict[str, list[tuple[int, ...]]] = field(default_factory=lambda: defaultdict(list))
    errors: list[str] = field(default_factory=list)
    _tokens: list[tuple[float, int]] = field(default_factory=list)
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def start(self) -> None:
        prompts = itertools.cycle(self.prompts)
        self._tasks = [asyncio.create_task(self._worker(prompts)) for _ in range(self.concurrency)]

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def tokens_per_second(self, seconds: float) -> float:
        """Measure over the next `seconds`."""
        started = time.monotonic()
        await asyncio.sleep(seconds)
        ended = time.monotonic()
        return sum(count for at, count in self._tokens if started <= at < ended) / (ended - started)

    @property
    def comparable(self) -> bool:
        """Whether answers to one prompt must be the same."""
        return self.temperature == 0.0

    @property
    def differing(self) -> list[str]:
        """Prompts that got different answers although they must not."""
        return [
            prompt for prompt, answers in self.answers.items() if self.comparable and len(set(answers)) > 1
        ]

    async def _worker(self, prompts: Any) -> None:  # noqa: ANN401 - an endless iterator of strings
        async with grpc.aio.insecure_channel(self.address) as channel:
            stub: Any = gateway_pb2_grpc.GatewayServiceStub(channel)
            while True:
                prompt = next(prompts)
                try:
                    self.answers[prompt].append(await self._ask(stub, prompt))
                except grpc.aio.AioRpcError as error:
                    self.errors.append(f"{error.code().name}: {error.details()}")

    async def _ask(self, stub: Any, prompt: str) -> tuple[int, ...]:  # noqa: ANN401 - generated
        message = gateway_pb2.GatewayGenerateRequest(
            messages=[gateway_pb2.ChatMessage(role="user", content=prompt)],
            temperature=self.temperature,
            max_tokens=self.max_tokens,
            ignore_eos=self.ignore_eos,
        )
        message.speculation.lookup = self.lookup
        tokens: list[int] = []
        async for chunk in stub.Generate(message, timeout=REQUEST_SECONDS):
            tokens.extend(chunk.token_ids)
            self._tokens.append((time.monotonic(), len(chunk.token_ids)))
        return tuple(tokens)
