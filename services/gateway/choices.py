"""Several answers to one request: derives a request for each, and merges their streams."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import TypeVar

from dspark_core.algorithms.prefix_hashes import BLOCK_TOKENS
from dspark_core.records import MAX_SEED
from services.common.lifecycle import end
from services.common.streams import closing, next_of
from services.gateway.preparation import PreparedRequest

_T = TypeVar("_T")


def choices_of(prepared: PreparedRequest, count: int, first: int = 0) -> list[PreparedRequest]:
    """Numbers the choices from `first`. The first is the request itself, so its answer is what a request for
    a single choice would get."""
    own = [prepared, *(_choice(prepared, index) for index in range(1, count))]
    return [replace(one, choice=first + one.choice) for one in own] if first else own


def _choice(prepared: PreparedRequest, index: int) -> PreparedRequest:
    request = prepared.request
    seed = request.sampling.seed
    return replace(
        prepared,
        choice=index,
        repeats_prompt=True,
        request=replace(
            request,
            request_id=f"{request.request_id}-{index}",
            sampling=replace(request.sampling, seed=None if seed is None else seed_of_choice(seed, index)),
        ),
    )


def seed_of_choice(seed: int, index: int) -> int:
    """A pure function of both, far from seeds that a client is likely to send next."""
    if index == 0:
        return seed
    digest = hashlib.blake2b(f"{seed}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) % (MAX_SEED + 1)


def together(streams: Sequence[AsyncIterator[_T]], prompt_tokens: int) -> AsyncIterator[_T]:
    """Merges the choices of one prompt; the first error ends all of them. Close to cancel.

    A prompt of at least one prefix block is prefilled once: the other streams start when the first has
    produced output, and find its pages in the prefix cache.
    """
    if len(streams) == 1:
        return streams[0]
    if prompt_tokens < BLOCK_TOKENS:
        return merged(streams)
    begun = asyncio.Event()
    return merged([_signalling(streams[0], begun), *(_after(begun, stream) for stream in streams[1:])])


async def _signalling(stream: AsyncIterator[_T], begun: asyncio.Event) -> AsyncIterator[_T]:
    async with closing(stream):
        async for item in stream:
            begun.set()
            yield item
        begun.set()


async def _after(begun: asyncio.Event, stream: AsyncIterator[_T]) -> AsyncIterator[_T]:
    async with closing(stream):
        await begun.wait()
        async for item in stream:
            yield item


async def merged(streams: Sequence[AsyncIterator[_T]]) -> AsyncIterator[_T]:
    """Yields items as they arrive. A stream is asked for its next item only after the previous one was
    consumed, so a slow reader slows all streams."""
    async with AsyncExitStack() as stack:
        for stream in streams:
            await stack.enter_async_context(closing(stream))
        waiting = {asyncio.create_task(next_of(stream)): stream for stream in streams}
        stack.push_async_callback(_end_all, waiting)
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            # Iterate `waiting`, not the set: items that are ready together have a deterministic order.
            for task in [task for task in waiting if task in done]:
                stream = waiting.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                yield item
                waiting[asyncio.create_task(next_of(stream))] = stream


async def _end_all(tasks: Mapping[asyncio.Task[_T], AsyncIterator[_T]]) -> None:
    for task in tasks:
        task.cancel()  # cancel all before waiting for any
    for task in tasks:
        await end(task)
