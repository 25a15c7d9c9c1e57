"""The use case without a transport: order, completion, cancellation, deadlines and metrics."""

import asyncio
import logging
from contextlib import aclosing

import pytest
from prometheus_client import CollectorRegistry

from dspark_core.errors import (
    DeadlineError,
    DrainingError,
    DSparkError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
)
from dspark_core.records import FinishReason, GenerateChunk, VerifierDescription
from services.gateway.admission import Admission
from services.gateway.callers.quotas import Account, Quota
from services.gateway.callers.tiers import Caller, Tier
from services.gateway.generation import TextGenerator, TimedDelta
from services.gateway.metrics import GatewayMetrics
from services.gateway.preparation import RequestPreparer
from services.gateway.requests import TextRequest
from services.gateway.served_model import ServedModel
from tests.support.byte_tokenizer import byte_tokenizer
from tests.support.clock import ManualClock
from tests.support.fake_generation import FakeBackend
from tests.support.polling import eventually

REQUEST = TextRequest(request_id="r", model="m", prompt="hi")


class Setup:
    def __init__(self, backend: FakeBackend, *, timeout_seconds: float = 30.0) -> None:
        self.backend = backend
        self.registry = CollectorRegistry()
        self.admission = Admission(max_running=1, max_waiting=1)
        self.clock = ManualClock()
        tokenizer = byte_tokenizer()
        self.generator = TextGenerator(
            preparer=RequestPreparer(ServedModel("m", backend), tokenizer),
            backend=backend,
            tokenizer=tokenizer,
            admission=self.admission,
            metrics=GatewayMetrics(self.registry),
            timeout_seconds=timeout_seconds,
            clock=self.clock,
        )

    async def collect(
        self, request: TextRequest = REQUEST, account: Account | None = None
    ) -> list[TimedDelta]:
        async with aclosing(self.generator.stream(request, account=account)) as deltas:
            return [timed async for timed in deltas]

    def metric(self, name: str, **labels: str) -> float | None:
        return self.registry.get_sample_value(f"dspark_gateway_{name}", labels)


async def test_text_arrives_round_by_round_and_ends_with_totals() -> None:
    setup = Setup(FakeBackend("abcdefg", chunk_tokens=3))
    deltas = [timed.delta for timed in await setup.collect()]
    assert [delta.text for delta in deltas] == ["abc", "def", "g"]
    assert [delta.finish_reason for delta in deltas] == [None, None, FinishReason.STOP]
    assert deltas[-1].usage.prompt_tokens == 2
    assert deltas[-1].usage.completion_tokens == 8
    assert setup.admission.running == 0
    assert setup.backend.cancelled == 0


async def test_a_stop_string_cancels_what_the_verifier_would_still_do() -> None:
    setup = Setup(FakeBackend("one two three four"))
    request = TextRequest(request_id="r", model="m", prompt="hi", stop=("two",))
    deltas = await setup.collect(request)
    assert "".join(timed.delta.text for timed in deltas) == "one "
    assert (setup.backend.cancelled, setup.backend.running) == (1, 0)
    assert setup.metric("generations_total", outcome="stop") == 1


async def test_closing_the_stream_cancels_the_backend_and_frees_the_place() -> None:
    setup = Setup(FakeBackend("abcdef"))
    async with aclosing(setup.generator.stream(REQUEST)) as deltas:
        await anext(deltas)
        assert setup.admission.running == 1
    assert (setup.backend.cancelled, setup.backend.running) == (1, 0)
    assert setup.admission.running == 0
    assert setup.metric("generations_total", outcome="cancelled") == 1


async def test_a_full_queue_refuses_before_any_work_is_done() -> None:
    setup = Setup(FakeBackend())
    setup.backend.hold_after_chunks = 0
    running = asyncio.create_task(setup.collect())
    await eventually(lambda: setup.backend.running == 1)
    waiting = asyncio.create_task(setup.collect())
    await eventually(lambda: setup.admission.waiting == 1)
    with pytest.raises(QueueFullError):
        await setup.collect(TextRequest(request_id="r", model="wrong model", prompt="hi"))
    setup.backend.release.set()
    await asyncio.gather(running, waiting)
    assert len(setup.backend.requests) == 2


async def test_a_key_whose_requests_a_full_gateway_refuses_has_all_its_places_left() -> None:
    setup = Setup(FakeBackend("ab"))
    account = Account("k", Quota(max_concurrent_requests=1))
    places = setup.admission.enter_all(2)
    for _ in range(2):
        with pytest.raises(QueueFullError):
            await setup.collect(account=account)
    for place in places:
        place.close()
    assert await setup.collect(account=account)


async def test_a_choice_that_ends_makes_room_for_the_next() -> None:
    setup = Setup(FakeBackend("ab"))
    request = TextRequest(request_id="r", model="m", prompt="hi", choices=2)
    deltas = await asyncio.wait_for(setup.collect(request), 15)
    assert [timed.choice for timed in deltas if timed.delta.finish_reason] == [0, 1]


async def test_a_request_past_its_deadline_is_cancelled() -> None:
    setup = Setup(FakeBackend("abcdef"), timeout_seconds=0.5)
    setup.backend.hold_after_chunks = 1
    with pytest.raises(DeadlineError, match=r"within 0\.5 s"):
        await setup.collect()
    assert (setup.backend.cancelled, setup.backend.running) == (1, 0)
    assert setup.metric("generations_total", outcome="DeadlineError") == 1


async def test_a_request_whose_turn_comes_once_the_gateway_shuts_down_is_not_begun() -> None:
    setup = Setup(FakeBackend())
    place = setup.admission.enter()
    await place.start(1.0)
    asked = asyncio.create_task(setup.collect())
    await eventually(lambda: setup.admission.waiting == 1)
    setup.admission.shut()
    place.close()
    with pytest.raises(DrainingError, match="shuts down"):
        await asyncio.wait_for(asked, 15)
    assert setup.backend.requests == []


async def test_the_deadline_counts_from_arrival(monkeypatch) -> None:
    setup = Setup(FakeBackend("abcdef"))
    describe = setup.backend.describe

    async def slowly() -> VerifierDescription:
        setup.clock.advance(31)
        return await describe()

    monkeypatch.setattr(setup.backend, "describe", slowly)
    setup.backend.hold_after_chunks = 1
    async with aclosing(setup.generator.stream(REQUEST)) as deltas:
        with pytest.raises(DeadlineError):
            [delta async for delta in deltas]


async def test_a_stream_without_a_finish_reason_is_an_error_not_an_answer(monkeypatch) -> None:
    backend = FakeBackend()
    monkeypatch.setattr(backend, "chunks", lambda _: [GenerateChunk(token_ids=(65,))])
    with pytest.raises(UnavailableError, match="without a finish reason"):
        await Setup(backend).collect()


async def test_metrics_tell_tokens_times_and_speculation() -> None:
    setup = Setup(FakeBackend("abcdefg", chunk_tokens=3))
    async with aclosing(setup.generator.stream(REQUEST)) as deltas:
        setup.clock.advance(0.25)
        async for _ in deltas:
            setup.clock.advance(0.3)
    assert setup.metric("generations_total", outcome="stop") == 1
    assert setup.metric("tokens_total", kind="prompt") == 2
    assert setup.metric("tokens_total", kind="completion") == 8
    assert setup.metric("time_to_first_token_seconds_count") == 1
    assert setup.metric("generation_seconds_count") == 1
    assert setup.metric("inter_token_seconds_count") == 2
    assert setup.metric("inter_token_seconds_sum") == pytest.approx(0.3 / 3 + 0.3 / 2)
    assert setup.metric("accepted_length_sum") == 3.0
    assert setup.metric("draft_tokens_total", stage="drafted") == 12
    assert setup.metric("draft_tokens_total", stage="accepted") == 6


async def test_the_error_of_a_failed_generation_is_counted_by_type() -> None:
    setup = Setup(FakeBackend())
    setup.backend.error = InvalidRequestError("no")
    with pytest.raises(InvalidRequestError):
        await setup.collect()
    assert setup.metric("generations_total", outcome="InvalidRequestError") == 1
    assert setup.admission.running == 0


@pytest.mark.parametrize("outcome", ["UnavailableError", "DeadlineError"])
def test_failures_that_alerts_watch_rise_from_zero(outcome) -> None:
    assert Setup(FakeBackend()).metric("generations_total", outcome=outcome) == 0


@pytest.mark.parametrize(
    "error", [QueueFullError("a speed floor would break"), UnavailableError("none left")]
)
async def test_what_was_refused_counts_as_no_work(error) -> None:
    setup = Setup(FakeBackend("ab"))
    setup.backend.error = error
    with pytest.raises(type(error)):
        await setup.collect()
    assert setup.metric("generations_total", outcome=type(error).__name__) == 1
    assert not setup.metric("tokens_total", kind="prompt")
    assert setup.metric("generation_seconds_count") == 0


async def test_what_breaks_off_in_the_middle_counts(monkeypatch) -> None:
    backend = FakeBackend()
    monkeypatch.setattr(backend, "chunks", lambda _: [GenerateChunk(token_ids=(65,))])
    setup = Setup(backend)
    with pytest.raises(UnavailableError):
        await setup.collect()
    assert setup.metric("tokens_total", kind="prompt") == 2
    assert setup.metric("generation_seconds_count") == 1


@pytest.mark.parametrize(
    ("header", "kind", "field"),
    [
        (60.0, InvalidRequestError, "X-Min-Tokens-Per-Second"),
        (None, UnavailableError, "the floor of tier 'gold'"),
    ],
)
async def test_a_floor_out_of_reach_has_the_name_of_where_it_came_from(header, kind, field) -> None:
    setup = Setup(FakeBackend())
    setup.backend.error = InvalidRequestError(
        "min_tokens_per_second must be within reach, got 60", field="min_tokens_per_second"
    )
    caller = Caller(tier=Tier(name="gold", min_tokens_per_second=60.0), asked_floor=header)
    with pytest.raises(kind, match=f"^{field} must be within reach, got 60"):
        await setup.collect(caller.sends(REQUEST))
    assert setup.metric("generations_total", outcome=kind.__name__) == 1


@pytest.mark.parametrize(("chunk_tokens", "broken", "held"), [(9, None, None), (3, 1, 0)])
async def test_a_floor_is_held_or_broken_only_where_there_was_a_speed(chunk_tokens, broken, held) -> None:
    setup = Setup(FakeBackend("abcdef", chunk_tokens=chunk_tokens))
    caller = Caller(tier=Tier(name="gold", min_tokens_per_second=60.0))
    async with aclosing(setup.generator.stream(caller.sends(REQUEST))) as deltas:
        async for _ in deltas:
            setup.clock.advance(1.0)
    assert setup.metric("speed_floors_total", tier="gold", held="no") == broken
    assert setup.metric("speed_floors_total", tier="gold", held="yes") == held


async def test_a_prompt_counts_once_for_all_its_choices() -> None:
    setup = Setup(FakeBackend("text"))
    await setup.collect(TextRequest(request_id="r", model="m", prompt="hi", choices=2))
    assert setup.metric("time_to_first_token_seconds_count") == 2
    for kind, tokens in {"prompt": len("hi"), "completion": 2 * len("text.")}.items():
        assert setup.metric("tokens_total", kind=kind) == tokens
        assert setup.metric("tier_tokens_total", tier="default", kind=kind) == tokens


async def test_every_request_leaves_one_line_in_the_log_without_its_text(caplog) -> None:
    caplog.set_level(logging.INFO)
    setup = Setup(FakeBackend("secret answer"))
    await setup.collect(TextRequest(request_id="r-1", model="m", prompt="secret question"))
    (line,) = [record for record in caplog.records if "r-1" in record.getMessage()]
    assert (line.levelno, line.outcome, line.completion_tokens) == (logging.INFO, "stop", 14)
    assert line.accepted_length == 3.0
    assert "secret" not in line.getMessage()


@pytest.mark.parametrize(
    ("error", "level"),
    [
        (UnavailableError("all verifiers are gone"), logging.WARNING),
        (RuntimeError("broken"), logging.WARNING),
        (QueueFullError("a speed floor would break"), logging.INFO),
    ],
)
async def test_failures_stand_out_in_the_log_and_refusals_do_not(caplog, error, level) -> None:
    caplog.set_level(logging.INFO)
    backend = FakeBackend()
    backend.error = error
    with pytest.raises(type(error)):
        await Setup(backend).collect()
    (line,) = [record for record in caplog.records if getattr(record, "request_id", None) == "r"]
    assert (line.levelno, line.outcome) == (level, type(error).__name__)


def unknown_model(setup: Setup) -> TextRequest:
    return TextRequest(request_id="r-1", model="another", prompt="secret question")


def too_long(setup: Setup) -> TextRequest:
    return TextRequest(request_id="r-1", model="m", prompt="secret question" * 1000)


def too_many_choices(setup: Setup) -> TextRequest:
    return TextRequest(request_id="r-1", model="m", prompt="secret question", choices=17)


def draining(setup: Setup) -> TextRequest:
    setup.admission.drain()
    return TextRequest(request_id="r-1", model="m", prompt="secret question", tier="gold")


def no_verifier(setup: Setup) -> TextRequest:
    setup.backend.describe_error = UnavailableError("no verifier serves model 'm' now")
    return TextRequest(request_id="r-1", model="m", prompt="secret question", tier="gold")


@pytest.mark.parametrize(
    ("ask", "outcome", "level"),
    [
        (unknown_model, "UnknownModelError", logging.INFO),
        (too_long, "ContextLengthError", logging.INFO),
        (too_many_choices, "InvalidRequestError", logging.INFO),
        (draining, "DrainingError", logging.WARNING),
        (no_verifier, "UnavailableError", logging.WARNING),
    ],
)
async def test_a_request_that_never_ran_is_counted_and_leaves_its_line_too(
    ask, outcome, level, caplog
) -> None:
    caplog.set_level(logging.INFO)
    setup = Setup(FakeBackend("answer"))
    request = ask(setup)
    with pytest.raises(DSparkError) as caught:
        await setup.collect(request)
    assert type(caught.value).__name__ == outcome
    (line,) = [record for record in caplog.records if "r-1" in record.getMessage()]
    assert (line.levelno, line.outcome, line.tier) == (level, outcome, request.tier)
    assert "secret" not in line.getMessage()
    assert setup.metric("generations_total", outcome=outcome) == 1
    assert not setup.metric("tokens_total", kind="prompt")
