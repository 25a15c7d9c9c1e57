"""Several answers to one request: the request for each, and merging their streams."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.prefix_hashes import BLOCK_TOKENS
from dspark_core.records import MAX_SEED, GenerateRequest, SamplingParams
from services.gateway.choices import choices_of, seed_of_choice, together
from services.gateway.preparation import PreparedRequest
from tests.support.polling import eventually


def prepared(seed: int | None) -> PreparedRequest:
    request = GenerateRequest(request_id="r", prompt_token_ids=(1,), sampling=SamplingParams(seed=seed))
    return PreparedRequest(request=request, stop=("x",))


def test_the_first_choice_is_the_request_itself() -> None:
    for seed in (None, 7):
        first, *others = choices_of(prepared(seed), 3)
        assert first == prepared(seed)
        assert [(one.choice, one.request.request_id, one.stop) for one in others] == [
            (1, "r-1", ("x",)),
            (2, "r-2", ("x",)),
        ]


def test_choices_without_a_seed_have_none() -> None:
    assert [one.request.sampling.seed for one in choices_of(prepared(None), 2)] == [None, None]


@given(st.integers(0, MAX_SEED), st.integers(1, 127))
def test_seeds_of_choices_are_functions_of_seed_and_place(seed: int, index: int) -> None:
    assert seed_of_choice(seed, 0) == seed
    derived = seed_of_choice(seed, index)
    assert derived == seed_of_choice(seed, index)
    assert 0 <= derived <= MAX_SEED
    assert derived not in (seed, seed_of_choice(seed, index - 1), seed_of_choice(seed ^ 1, index))


class Source:
    """Streams fed by the test through queues; None ends a stream, an exception fails it."""

    def __init__(self, count: int) -> None:
        self.queues: list[asyncio.Queue[str | Exception | None]] = [asyncio.Queue() for _ in range(count)]
        self.open = 0
        self.begun: list[int] = []

    def streams(self) -> list[AsyncIterator[str]]:
        return [self._stream(index) for index in range(len(self.queues))]

    async def _stream(self, index: int) -> AsyncIterator[str]:
        self.open += 1
        self.begun.append(index)
        try:
            while (item := await self.queues[index].get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.open -= 1

    def put(self, index: int, *items: str | Exception | None) -> None:
        for item in items:
            self.queues[index].put_nowait(item)


async def test_items_come_as_they_are_there_and_the_last_stream_ends_all() -> None:
    source = Source(2)
    async with aclosing(together(source.streams(), 1)) as merged:
        source.put(1, "b1")
        assert await anext(merged) == "b1"
        source.put(0, "a1", None)
        assert await anext(merged) == "a1"
        source.put(1, "b2", None)
        assert [item async for item in merged] == ["b2"]
    assert source.open == 0


async def test_the_first_error_ends_all_streams() -> None:
    source = Source(3)
    merged = together(source.streams(), 1)
    source.put(0, "a1")
    assert await anext(merged) == "a1"
    source.put(2, ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        await anext(merged)
    assert source.open == 0


async def test_closing_or_cancelling_ends_all_streams() -> None:
    source = Source(2)
    async with aclosing(together(source.streams(), 1)) as merged:
        source.put(0, "a1")
        await anext(merged)
        assert source.open == 2
    assert source.open == 0
    source = Source(2)
    task = asyncio.ensure_future(anext(together(source.streams(), 1)))
    await eventually(lambda: source.open == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert source.open == 0


@pytest.mark.parametrize(("prompt_tokens", "first"), [(BLOCK_TOKENS, [0]), (BLOCK_TOKENS - 1, [0, 1, 2])])
async def test_a_prompt_worth_sharing_is_read_for_the_first_choice_only(prompt_tokens, first) -> None:
    source = Source(3)
    merged = together(source.streams(), prompt_tokens)
    waiting = asyncio.ensure_future(anext(merged))
    await eventually(lambda: source.begun == first)
    source.put(0, "a1", None)
    assert await waiting == "a1"
    source.put(1, None)
    source.put(2, "c1", None)
    assert [item async for item in merged] == ["c1"]
    assert source.begun == [0, 1, 2]


async def test_choices_that_wait_for_the_first_end_with_its_error() -> None:
    source = Source(2)
    source.put(0, ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        await anext(together(source.streams(), BLOCK_TOKENS))
    assert (source.begun, source.open) == ([0], 0)
