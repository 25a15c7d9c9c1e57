"""The verifier's asyncio interface over a real round loop."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence

import pytest
from torch import Tensor

from dspark_core.engine.grammars import SequenceGrammar
from dspark_core.engine.rounds import verifier as engine_verifier
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.verifier import Verifier
from dspark_core.engine.target.batch import Run
from dspark_core.errors import InvalidRequestError, QueueFullError, UnavailableError
from dspark_core.records import FinishReason, GenerateRequest
from tests.support.clock import ManualClock
from tests.support.polling import eventually
from tests.unit.engine.tiny import make_loop, naive_greedy, prompts, request, tiny_decoder, tiny_engine


@pytest.fixture
def started() -> Iterator[Callable[..., Verifier]]:
    """Starts verifiers and stops them even if the test fails."""
    made: list[Verifier] = []

    def start(rounds: RoundLoop, **options: object) -> Verifier:
        made.append(Verifier(rounds, **options))
        made[-1].start()
        return made[-1]

    yield start
    for one in made:
        one.stop()


@pytest.fixture
def verifier(started: Callable[..., Verifier]) -> Verifier:
    return started(make_loop())


async def collect(verifier: Verifier, one: GenerateRequest) -> list[int]:
    return [token async for chunk in verifier.generate(one) for token in chunk.token_ids]


async def test_concurrent_streams_get_their_own_tokens(verifier: Verifier) -> None:
    asked = [request(f"r{i}", prompt, 8) for i, prompt in enumerate(prompts(5))]
    results = await asyncio.gather(*(collect(verifier, one) for one in asked))
    decoder = tiny_decoder()
    assert results == [naive_greedy(decoder, one.prompt_token_ids, 8) for one in asked]


async def test_a_reader_that_falls_behind_gets_what_it_missed_as_one_chunk(verifier: Verifier) -> None:
    one = request("a", [1, 2, 3], 12)
    stream = verifier.generate(one)
    first = await anext(stream)
    await eventually(lambda: not verifier.status.running_requests)
    await collect(verifier, request("b", [1], 1))  # the last round's output has arrived before its
    rest = await anext(stream)
    with pytest.raises(StopAsyncIteration):
        await anext(stream)
    assert [*first.token_ids, *rest.token_ids] == naive_greedy(tiny_decoder(), [1, 2, 3], 12)
    assert first.token_ids
    assert rest.finish_reason is FinishReason.LENGTH
    assert rest.stats is not None
    assert rest.stats.committed_tokens == 11  # in rounds; the first token comes from prefill


async def test_a_round_wakes_its_listeners_together(
    verifier: Verifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Waking an event loop costs a system call, which would otherwise be paid for every token of a batch."""
    loop, wakes = asyncio.get_running_loop(), []
    wake = loop.call_soon_threadsafe
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *told, **more: wakes.append(wake(*told, **more)))
    asked = [request(f"r{i}", prompt, 40) for i, prompt in enumerate(prompts(5))]
    results = await asyncio.gather(*(collect(verifier, one) for one in asked))
    assert sum(map(len, results)) == 200
    # One per round and one per arriving request.
    assert len(wakes) < 100


async def test_closing_a_stream_frees_its_pages(verifier: Verifier) -> None:
    stream = verifier.generate(request("a", [1, 2, 3], 200))
    await anext(stream)
    assert verifier.status.running_requests == 1
    await stream.aclose()
    await eventually(
        lambda: verifier.status.running_requests == 0 and verifier.status.free_kv_fraction == 1.0
    )


async def test_a_cancelled_caller_frees_its_pages(verifier: Verifier) -> None:
    task = asyncio.create_task(collect(verifier, request("a", [1, 2, 3], 240)))
    await eventually(lambda: verifier.status.running_requests == 1)
    task.cancel()
    await eventually(
        lambda: verifier.status.running_requests == 0 and verifier.status.free_kv_fraction == 1.0
    )


async def test_refusals_reach_the_caller(started) -> None:
    one = started(make_loop(max_running=1, max_waiting=1))
    with pytest.raises(InvalidRequestError, match="got -5"):
        await collect(one, request("bad", [-5]))
    streams = [one.generate(request(f"r{i}", [1], 250)) for i in range(3)]
    first = asyncio.create_task(anext(streams[0]))
    await first
    second = asyncio.create_task(anext(streams[1]))
    await eventually(lambda: one.status.waiting_requests == 1)
    with pytest.raises(QueueFullError):
        await anext(streams[2])
    second.cancel()


async def test_a_later_attempt_takes_over_from_a_stream_that_nobody_reads(started) -> None:
    """As after a connection that only the caller has seen break."""
    one = started(make_loop())
    whole = await collect(one, request("whole", [1, 2, 3], 40))
    lost = one.generate(request("a", [1, 2, 3], 200))
    first = (await anext(lost)).token_ids
    with pytest.raises(InvalidRequestError, match="'a' is already running"):
        await collect(one, request("a", [1, 2, 3], 40))
    rest = dataclasses.replace(
        request("a", [1, 2, 3, *first], 40 - len(first)), generated_tokens=len(first), attempt=1
    )
    assert [*first, *await collect(one, rest)] == whole
    with pytest.raises(UnavailableError, match="sent again"):
        _ = [chunk async for chunk in lost]
    await eventually(lambda: one.status.free_kv_fraction == 1.0)


async def test_stopping_fails_what_is_running(started) -> None:
    one = started(make_loop())
    stream = one.generate(request("a", [1, 2, 3], 240))
    await anext(stream)
    one.stop()
    with pytest.raises(UnavailableError, match="stopping"):
        _ = [chunk async for chunk in stream]
    with pytest.raises(UnavailableError, match="stopping"):
        await collect(one, request("b", [1]))


def failing(fails: Callable[[int, Sequence[Run]], bool], **options: object) -> RoundLoop:
    """Its target raises in the passes that `fails` picks by number, from 1, and by what they compute."""
    engine, numbers = tiny_engine(), itertools.count(1)
    forward = engine.forward

    def forward_or_fail(runs: Sequence[Run]) -> Tensor:
        if fails(next(numbers), runs):
            raise MemoryError("no memory for this round")
        return forward(runs)

    engine.forward = forward_or_fail
    return make_loop(engine, **options)


@pytest.mark.parametrize("failed", [{1}, {2}, {3}, {2, 9, 16}, {*range(2, 45, 7)}])
async def test_a_failed_round_loses_nothing(started, failed: set[int]) -> None:
    one = started(failing(lambda number, runs: number in failed))
    asked = [request(f"r{i}", prompt, 20) for i, prompt in enumerate(prompts(4))]
    results = await asyncio.gather(*(collect(one, each) for each in asked))
    assert results == [naive_greedy(tiny_decoder(), each.prompt_token_ids, 20) for each in asked]
    assert one.status.healthy
    await eventually(lambda: one.status.free_kv_fraction == 1.0)


async def test_a_request_that_takes_rounds_down_is_the_only_one_lost(started) -> None:
    """It does so from its tenth token on."""
    one = started(
        failing(lambda number, runs: any(run.sequence_id == "r2" and run.start > 20 for run in runs))
    )
    asked = [request(f"r{i}", prompt, 40) for i, prompt in enumerate(prompts(4))]
    results = await asyncio.gather(*(collect(one, each) for each in asked), return_exceptions=True)
    lost = results.pop(2)
    assert isinstance(lost, UnavailableError)
    assert "MemoryError" not in str(lost)
    del asked[2]
    assert results == [naive_greedy(tiny_decoder(), each.prompt_token_ids, 40) for each in asked]
    assert one.status.healthy
    await eventually(lambda: one.status.free_kv_fraction == 1.0)


async def test_a_long_prompt_is_tried_alone_for_one_chunk_only(started) -> None:
    """Others would wait for all of it."""
    alone: list[int] = []

    def fails(number: int, runs: Sequence[Run]) -> bool:
        if number > 4 and len(runs) == 1 and runs[0].sequence_id == "long":
            alone.append(runs[0].start)
        return number == 4

    one = started(failing(fails, prefill_chunk_tokens=8))
    asked = [request("short", [1, 2, 3], 60), request("long", list(range(1, 60)), 5)]
    results = await asyncio.gather(*(collect(one, each) for each in asked))
    assert results == [naive_greedy(tiny_decoder(), each.prompt_token_ids, each.max_tokens) for each in asked]
    assert len(alone) == 1


async def test_requests_that_wait_outlive_a_failing_round(started) -> None:
    one = started(failing(lambda number, runs: runs[0].sequence_id == "a", max_running=1))
    asked = [request(name, prompt, 40) for name, prompt in zip("ab", prompts(2), strict=True)]
    lost, kept = await asyncio.gather(*(collect(one, each) for each in asked), return_exceptions=True)
    assert isinstance(lost, UnavailableError)
    assert kept == naive_greedy(tiny_decoder(), asked[1].prompt_token_ids, 40)


class Uncommitted(RoundLoop):
    """Fails where tokens may have been committed already that nobody has been told of."""

    failed = False

    def _append(self, sequence, proposal, verdict):
        committed = super()._append(sequence, proposal, verdict)
        if len(sequence.tokens) > 10 and not self.failed:
            self.failed = True
            raise MemoryError("no memory to commit")
        return committed


async def test_what_may_have_been_committed_untold_is_given_up(started) -> None:
    one = started(loop_with(Uncommitted))
    told: list[int] = []

    async def listen() -> None:
        async for chunk in one.generate(request("a", [1, 2, 3], 20)):
            told.extend(chunk.token_ids)

    with pytest.raises(UnavailableError):
        await listen()
    assert told == naive_greedy(tiny_decoder(), [1, 2, 3], 20)[: len(told)]
    assert len(await collect(one, request("a", [1, 2, 3], 20))) == 20
    await eventually(lambda: one.status.free_kv_fraction == 1.0)


def loop_with(kind: type[RoundLoop]) -> RoundLoop:
    return kind(tiny_engine(), make_loop()._planner)


class Failing(RoundLoop):
    def step(self):
        raise MemoryError("no memory for any round")


async def test_rounds_that_all_fail_are_a_problem(started) -> None:
    one = started(loop_with(Failing))
    for number in range(6):
        with pytest.raises(UnavailableError):
            await collect(one, request(f"r{number}", [1], 5))
    await eventually(lambda: one.status.problem == "the last 6 rounds failed")


class BrokenCancel(RoundLoop):
    release = threading.Event()

    def cancel(self, request_id: str) -> None:
        self.release.wait(20)
        raise KeyError(request_id)


async def test_a_thread_that_dies_leaves_nobody_waiting(started) -> None:
    one = started(loop_with(BrokenCancel))
    left, kept = (one.generate(request(name, [1, 2], 240)) for name in ("left", "kept"))
    await anext(left)
    await anext(kept)
    await left.aclose()  # cancelling it kills the thread
    queued = asyncio.create_task(collect(one, request("queued", [1], 5)))
    await eventually(lambda: one.status.waiting_requests == 1)
    BrokenCancel.release.set()
    with pytest.raises(UnavailableError, match="broken"):
        async with asyncio.timeout(15):
            _ = [chunk async for chunk in kept]
    with pytest.raises(UnavailableError, match="broken"):
        await asyncio.wait_for(queued, 15)
    assert "KeyError" in one.status.problem
    with pytest.raises(UnavailableError, match="broken"):
        await collect(one, request("new", [1], 5))


class BrokenSubmit(RoundLoop):
    def submit(self, one: GenerateRequest, grammar: SequenceGrammar | None = None) -> None:
        if one.request_id == "odd":
            raise ZeroDivisionError
        super().submit(one, grammar)


async def test_a_request_that_cannot_be_taken_in_is_its_own_problem(started) -> None:
    one = started(loop_with(BrokenSubmit))
    with pytest.raises(ZeroDivisionError):
        await collect(one, request("odd", [1], 5))
    assert len(await collect(one, request("even", [1], 5))) == 5
    assert one.status.healthy


class Stuck(RoundLoop):
    entered, release = threading.Event(), threading.Event()

    def step(self):
        self.entered.set()
        self.release.wait(20)
        return super().step()


async def test_a_round_that_does_not_end_is_a_problem_and_holds_up_no_stop(started, monkeypatch) -> None:
    monkeypatch.setattr(engine_verifier, "JOIN_SECONDS", 0.05)
    clock = ManualClock()
    one = started(loop_with(Stuck), clock=clock)
    asked = asyncio.create_task(collect(one, request("r", [1], 5)))
    await eventually(Stuck.entered.is_set)
    clock.advance(600)
    assert one.status.healthy
    clock.advance(1)
    assert one.status.problem == "a round has not ended for 601 s"
    one.stop()
    Stuck.release.set()
    with pytest.raises(UnavailableError, match="stopping"):
        await asyncio.wait_for(asked, 15)


async def test_a_verifier_without_work_does_not_count_as_hung(started) -> None:
    clock = ManualClock()
    one = started(make_loop(), clock=clock)
    await collect(one, request("r", [1], 5))
    clock.advance(2 * engine_verifier.STALL_SECONDS)
    assert one.status.healthy


async def test_requests_count_as_waiting_from_when_they_arrive(started) -> None:
    """The scheduler, told that they arrived, must not miss them while a long round delays queueing them."""

    class Slow(Stuck):
        entered = threading.Event()
        release = threading.Event()

    one = started(loop_with(Slow))
    first = asyncio.create_task(collect(one, request("a", [1], 3)))
    await eventually(Slow.entered.is_set)
    assert one.status.waiting_requests == 1
    asked = [asyncio.create_task(collect(one, request(f"r{i}", [1], 3))) for i in range(3)]
    await asyncio.sleep(0)
    assert one.status.waiting_requests == 4
    asked[0].cancel()
    await asyncio.wait({asked[0]})
    assert one.status.waiting_requests == 3
    Slow.release.set()
    await asyncio.wait_for(asyncio.gather(first, *asked[1:]), 15)
    await eventually(lambda: one.status.running_requests + one.status.waiting_requests == 0)
