"""Routing and failover with verifiers that die on command."""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing

import pytest

from dspark_core.errors import (
    DeadlineError,
    InvalidRequestError,
    QueueFullError,
    UnavailableError,
    UnreachableError,
)
from dspark_core.records import (
    AssignRequest,
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    Replica,
    Role,
    SamplingParams,
    SpeculationStats,
    VerifierDescription,
)
from services.gateway.verifiers.routed_backend import RoutedBackend
from services.gateway.verifiers.verifier_pool import VerifierPool
from tests.support.clock import ManualClock
from tests.support.polling import eventually

REQUEST = GenerateRequest(
    request_id="r", prompt_token_ids=(1,), max_tokens=20, stop_token_ids=(0,), sampling=SamplingParams(seed=1)
)


def next_token(position: int) -> int:
    """A coupled target: each token depends on its absolute position alone; position 12 is the stop token."""
    return 0 if position == 12 else 100 + position


EXPECTED = [next_token(position) for position in range(1, 13)]


class FakeVerifier:
    def __init__(self) -> None:
        self.requests: list[GenerateRequest] = []
        self.deadline_seconds = 0.0
        self.cancelled = 0
        self.error: Exception | None = None
        self.fails_after = 0
        """Chunks before `error`."""
        self.serves: Callable[[], None] = lambda: None
        """Called before each chunk."""
        self.ends_after: int | None = None
        """Chunks after which the stream ends without a finish reason."""
        self.hides_finish = False
        self.pauses_after: int | None = None
        """Chunks sent before it waits for `resume`."""
        self.resume = asyncio.Event()
        self.hangs = False
        """Whether `describe` waits for `resume` as well."""
        self.described = 0
        self.describe_error: Exception | None = None
        self.weights = ""

    async def describe(self) -> VerifierDescription:
        self.described += 1
        if self.describe_error is not None:
            raise self.describe_error
        if self.hangs:
            await self.resume.wait()
        if self.error is not None:
            raise self.error
        return VerifierDescription(model="m", vocab_size=500, max_context_tokens=64)

    async def generate(
        self, request: GenerateRequest, *, deadline_seconds: float
    ) -> AsyncIterator[GenerateChunk]:
        self.deadline_seconds = deadline_seconds
        self.requests.append(request)
        if request.weights and request.weights != self.weights:
            raise UnavailableError(f"this verifier serves weights {self.weights}")
        position, sent = len(request.prompt_token_ids), 0
        finish = None
        try:
            while finish is None:
                if self.error is not None and sent == self.fails_after:
                    raise self.error
                self.serves()
                if sent == self.pauses_after:
                    await self.resume.wait()
                tokens = [next_token(at) for at in (position, position + 1) if at <= 12]
                position, sent = position + 2, sent + 1
                if 0 in tokens and not self.hides_finish:
                    finish = FinishReason.STOP
                stats = SpeculationStats(rounds=sent, committed_tokens=2 * sent)
                weights = self.weights if sent == 1 else ""
                yield GenerateChunk(
                    token_ids=tuple(tokens), finish_reason=finish, stats=stats, weights=weights
                )
                if sent == self.ends_after:
                    return
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise


class FakeScheduler:
    """Assigns the first replica that is not excluded."""

    def __init__(self, names: Sequence[str]) -> None:
        self.replicas = [replica(name) for name in names]
        self.error: Exception | None = None
        self.refuses_replays: Exception | None = None
        self.asked = 0
        self.listed = 0

    async def list_replicas(self, role: Role | None = None) -> tuple[Replica, ...]:
        assert role is Role.VERIFIER
        if self.error is not None:
            raise self.error
        self.listed += 1
        return tuple(self.replicas)

    async def assign(self, request: AssignRequest) -> Replica:
        self.asked += 1
        if self.error is not None:
            raise self.error
        if request.exclude_replica_ids and self.refuses_replays is not None:
            assert request.wait_seconds == 0
            raise self.refuses_replays
        for candidate in self.replicas:
            usable = request.weights in ("", candidate.weights)
            if usable and candidate.replica_id not in request.exclude_replica_ids:
                return candidate
        raise UnavailableError("no healthy verifier")


def replica(name: str, **fields: object) -> Replica:
    return Replica(replica_id=name, role=Role.VERIFIER, address=name, model="m", **fields)


class FakeConnection:
    def __init__(self, verifier: FakeVerifier) -> None:
        self.verifier = verifier
        self.closed = False

    async def close(self) -> None:
        self.closed = True


class Cluster:
    def __init__(self, *names: str, deadline_seconds: float = 10.0) -> None:
        self.verifiers = {name: FakeVerifier() for name in names}
        self.connections = {name: FakeConnection(verifier) for name, verifier in self.verifiers.items()}
        self.scheduler = FakeScheduler(names)
        self.clock = ManualClock()
        self.backend = RoutedBackend(
            model="m",
            scheduler=self.scheduler,
            pool=VerifierPool(self.connections.__getitem__),
            deadline_seconds=deadline_seconds,
            silence_seconds=0.01,
            answer_seconds=0.05,
            clock=self.clock,
        )

    def __getitem__(self, name: str) -> FakeVerifier:
        return self.verifiers[name]

    def serve_weights(self, **weights: str) -> None:
        """Makes verifiers serve these weights, and register so."""
        for name, served in weights.items():
            self.verifiers[name].weights = served
        self.scheduler.replicas = [replica(name, weights=served) for name, served in weights.items()]

    async def run(self) -> list[GenerateChunk]:
        async with aclosing(self.backend.generate(REQUEST)) as chunks:
            return [chunk async for chunk in chunks]


def tokens(chunks: Sequence[GenerateChunk]) -> list[int]:
    return [token for chunk in chunks for token in chunk.token_ids]


async def test_a_healthy_verifier_serves_the_whole_request() -> None:
    cluster = Cluster("a", "b")
    chunks = await cluster.run()
    assert tokens(chunks) == EXPECTED
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert (len(cluster["a"].requests), len(cluster["b"].requests)) == (1, 0)
    assert cluster["a"].cancelled == 0


@pytest.mark.parametrize("after", [0, 1, 3, 5])
async def test_a_verifier_lost_anywhere_in_the_stream_changes_no_token(after) -> None:
    cluster = Cluster("a", "b")
    cluster["a"].error, cluster["a"].fails_after = UnavailableError("killed"), after
    chunks = await cluster.run()
    assert tokens(chunks) == EXPECTED
    assert cluster["b"].requests[0].prompt_token_ids == (1, *EXPECTED[: 2 * after])
    assert cluster["b"].requests[0].max_tokens == 20 - 2 * after
    assert chunks[-1].stats is not None
    assert chunks[-1].stats.rounds == 6


@pytest.mark.parametrize(
    "refusal",
    [
        QueueFullError("floors would break"),
        InvalidRequestError("a single request gets about 25 here", field="min_tokens_per_second"),
    ],
)
async def test_a_stream_whose_verifier_is_lost_goes_on_where_its_floor_does_not_hold(refusal) -> None:
    cluster = Cluster("a", "b")
    await cluster.backend.refresh_view()
    cluster["a"].error, cluster["a"].fails_after = UnavailableError("killed"), 2
    cluster.scheduler.refuses_replays = refusal
    assert tokens(await cluster.run()) == EXPECTED


async def test_a_verifier_that_ends_a_stream_too_early_is_replaced() -> None:
    cluster = Cluster("a", "b")
    cluster["a"].ends_after = 2
    assert tokens(await cluster.run()) == EXPECTED
    assert cluster["b"].requests[0].prompt_token_ids == (1, *EXPECTED[:4])


async def test_a_stop_token_whose_finish_was_lost_ends_the_request() -> None:
    cluster = Cluster("a", "b")
    cluster["a"].hides_finish = True
    cluster["a"].error, cluster["a"].fails_after = UnavailableError("killed"), 6
    chunks = await cluster.run()
    assert tokens(chunks) == EXPECTED
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert cluster["b"].requests == []


async def test_an_error_after_the_finish_is_nobodys_concern() -> None:
    cluster = Cluster("a")

    class ThenFails(FakeVerifier):
        async def generate(
            self, request: GenerateRequest, *, deadline_seconds: float
        ) -> AsyncIterator[GenerateChunk]:
            yield GenerateChunk(token_ids=(5,), finish_reason=FinishReason.STOP)
            raise UnavailableError("connection reset")

    cluster.connections["a"].verifier = ThenFails()
    assert tokens(await cluster.run()) == [5]


async def test_attempts_are_bounded() -> None:
    cluster = Cluster("a", "b", "c", "d")
    for verifier in cluster.verifiers.values():
        verifier.error = UnavailableError("killed")
    with pytest.raises(UnavailableError, match="no verifier for model 'm' is left after 3 failed"):
        await cluster.run()
    assert [len(verifier.requests) for verifier in cluster.verifiers.values()] == [1, 1, 1, 0]


async def test_addresses_that_nobody_answers_at_do_not_use_attempts_up() -> None:
    cluster = Cluster(*"abcde")
    for name in "abcd":
        cluster[name].error = UnreachableError("connection refused")
    assert tokens(await cluster.run()) == EXPECTED
    assert [len(verifier.requests) for verifier in cluster.verifiers.values()] == [1, 1, 1, 1, 1]


async def test_attempts_are_bounded_where_nobody_answers_at_all() -> None:
    cluster = Cluster(*"abcde")
    for verifier in cluster.verifiers.values():
        verifier.error = UnreachableError("connection refused")
    with pytest.raises(UnavailableError, match="no verifier for model 'm' is left after 3 failed"):
        await cluster.run()
    assert sum(len(verifier.requests) for verifier in cluster.verifiers.values()) == 5 + 3


async def test_a_stream_outlives_a_rollout_of_more_verifiers_than_it_may_lose_in_a_row() -> None:
    names = "abcde"
    cluster = Cluster(*names, deadline_seconds=600.0)
    for verifier in cluster.verifiers.values():
        verifier.serves = lambda: cluster.clock.advance(31.0)
    for name in names[:4]:
        cluster[name].error, cluster[name].fails_after = UnavailableError("shutting down"), 1
    assert tokens(await cluster.run()) == EXPECTED
    assert [len(cluster[name].requests) for name in names] == [1] * 5


class LostOnce(FakeVerifier):
    """Fails its first request and is back at once, as after a restart or a broken connection."""

    async def generate(
        self, request: GenerateRequest, *, deadline_seconds: float
    ) -> AsyncIterator[GenerateChunk]:
        self.error = UnavailableError("connection reset") if not self.requests else None
        self.fails_after = 1
        async for chunk in super().generate(request, deadline_seconds=deadline_seconds):
            yield chunk


@pytest.mark.parametrize("names", ["a", "ab"])
async def test_a_stream_returns_to_a_verifier_that_is_back_when_no_other_is_left(names) -> None:
    cluster = Cluster(*names)
    for name in names:
        cluster.verifiers[name] = cluster.connections[name].verifier = LostOnce()
    assert tokens(await cluster.run()) == EXPECTED
    assert [len(cluster[name].requests) for name in names] == [2, 1][: len(names)]


async def test_a_full_verifier_is_passed_over_and_named_when_nobody_is_left() -> None:
    cluster = Cluster("a", "b")
    cluster["a"].error = QueueFullError("queue of a is full", retry_after_seconds=3)
    assert tokens(await cluster.run()) == EXPECTED
    cluster["b"].error = UnavailableError("killed")
    with pytest.raises(QueueFullError, match="queue of a is full"):
        await cluster.run()


async def test_the_callers_own_errors_are_not_tried_elsewhere() -> None:
    cluster = Cluster("a", "b")
    cluster["a"].error = InvalidRequestError("bad", field="seed")
    with pytest.raises(InvalidRequestError):
        await cluster.run()
    assert cluster["b"].requests == []


async def test_replays_share_one_deadline() -> None:
    cluster = Cluster("a", "b")
    cluster["a"].error, cluster["a"].fails_after = UnavailableError("killed"), 1
    async with aclosing(cluster.backend.generate(REQUEST)) as chunks:
        await anext(chunks)
        cluster.clock.advance(4)
        await anext(chunks)
        assert [cluster[name].deadline_seconds for name in "ab"] == [10, 6]
        cluster["b"].error, cluster["b"].fails_after = UnavailableError("killed"), 1
        cluster.clock.advance(7)
        with pytest.raises(DeadlineError, match="within 10 s"):
            await anext(chunks)


async def test_closing_the_stream_cancels_the_verifier() -> None:
    cluster = Cluster("a")
    async with aclosing(cluster.backend.generate(REQUEST)) as chunks:
        await anext(chunks)
    assert cluster["a"].cancelled == 1


async def test_without_a_scheduler_requests_route_by_the_last_view() -> None:
    cluster = Cluster("a", "b")
    await cluster.backend.refresh_view()
    cluster.scheduler.error = UnavailableError("connection refused")
    assert tokens(await cluster.run()) == EXPECTED
    cluster["a"].error = UnavailableError("killed")
    assert tokens(await cluster.run()) == EXPECTED
    assert len(cluster["a"].requests) == 2  # what has ended there does not weigh on it
    assert cluster.scheduler.asked == 1  # then not asked for a while
    cluster.clock.advance(1.5)
    await cluster.run()
    assert cluster.scheduler.asked == 2


async def test_without_a_scheduler_a_replica_that_failed_is_tried_last() -> None:
    cluster = Cluster("a", "b")
    await cluster.backend.refresh_view()
    cluster.scheduler.error = UnavailableError("connection refused")
    cluster["a"].error = UnavailableError("killed")
    for _ in range(3):
        assert tokens(await cluster.run()) == EXPECTED
    assert len(cluster["a"].requests) == 1
    cluster["a"].error, cluster["b"].error = None, UnavailableError("killed")
    assert tokens(await cluster.run()) == EXPECTED  # a is back at its old address
    assert len(cluster["b"].requests) == 4
    assert tokens(await cluster.run()) == EXPECTED
    assert len(cluster["b"].requests) == 4


async def test_without_a_scheduler_a_full_replica_is_tried_again() -> None:
    cluster = Cluster("a")
    await cluster.backend.refresh_view()
    cluster.scheduler.error = UnavailableError("connection refused")
    cluster["a"].error = QueueFullError("full")
    with pytest.raises(QueueFullError):
        await cluster.run()
    cluster["a"].error = None
    assert tokens(await cluster.run()) == EXPECTED


async def test_with_neither_scheduler_nor_view_nobody_can_serve() -> None:
    cluster = Cluster("a")
    cluster.scheduler.error = DeadlineError("no answer")
    with pytest.raises(UnavailableError, match="no verifier for model 'm': no answer"):
        await cluster.run()


async def test_the_view_skips_draining_and_other_models_and_spreads_by_load() -> None:
    cluster = Cluster("a", "b", "c", "d")
    foreign = Replica(replica_id="d", role=Role.VERIFIER, address="d", model="other")
    cluster.scheduler.replicas = [
        replica("a", draining=True),
        replica("b", running_requests=5),
        replica("c", running_requests=2, waiting_requests=1),
        foreign,
    ]
    await cluster.backend.refresh_view()
    cluster.scheduler.error = UnavailableError("down")
    async with aclosing(cluster.backend.generate(REQUEST)) as first:
        await anext(first)
        assert len(cluster["c"].requests) == 1
        assert tokens(await cluster.run()) == EXPECTED
        assert len(cluster["b"].requests) == 1


async def test_a_scheduler_that_knows_nobody_yet_does_not_empty_the_view() -> None:
    cluster = Cluster("a")
    await cluster.backend.refresh_view()
    cluster.scheduler.replicas = []
    await cluster.backend.refresh_view()
    assert tokens(await cluster.run()) == EXPECTED


async def test_connections_of_replicas_that_are_gone_are_closed_once_unused() -> None:
    cluster = Cluster("a", "b")
    async with aclosing(cluster.backend.generate(REQUEST)) as chunks:
        await anext(chunks)
        cluster.scheduler.replicas = [replica("b")]
        await cluster.backend.refresh_view()
        assert not cluster.connections["a"].closed
    await cluster.backend.refresh_view()
    assert cluster.connections["a"].closed


async def test_the_view_is_kept_fresh_through_failures() -> None:
    cluster = Cluster("a")
    cluster.scheduler.error = UnavailableError("down")
    keeping = asyncio.create_task(cluster.backend.keep_view(interval_seconds=0.001))
    await asyncio.sleep(0)
    cluster.scheduler.error = None
    await eventually(lambda: cluster.scheduler.listed > 0)
    cluster.scheduler.error = UnavailableError("down again")
    assert await cluster.run()  # routed by the view
    keeping.cancel()
    await asyncio.gather(keeping, return_exceptions=True)


@pytest.mark.parametrize("after", [0, 2])
async def test_a_stream_leaves_a_verifier_that_hangs(after) -> None:
    cluster = Cluster("a", "b")
    await cluster.backend.refresh_view()
    cluster["a"].hangs, cluster["a"].pauses_after = True, after
    chunks = await asyncio.wait_for(cluster.run(), 15)
    assert tokens(chunks) == EXPECTED
    assert len(cluster["b"].requests[0].prompt_token_ids) == 1 + 2 * after
    assert cluster["a"].cancelled == 1
    assert cluster.connections["a"].closed  # the next request must not wait on it
    assert not cluster.connections["b"].closed


async def test_a_stream_stays_with_a_verifier_that_is_only_slow() -> None:
    cluster = Cluster("a", "b")
    await cluster.backend.refresh_view()
    cluster["a"].pauses_after = 2
    running = asyncio.create_task(cluster.run())
    await eventually(lambda: cluster["a"].described >= 3)
    cluster["a"].resume.set()
    assert tokens(await running) == EXPECTED
    assert cluster["b"].requests == []


@pytest.mark.parametrize("names", ["a", "ab"])
async def test_a_stream_waits_where_nobody_answers(names) -> None:
    cluster = Cluster(*names)
    await cluster.backend.refresh_view()
    for name in names:
        cluster[name].hangs = True
    cluster["a"].hangs, cluster["a"].pauses_after = True, 2
    running = asyncio.create_task(cluster.run())
    await eventually(lambda: bool(cluster["a"].requests))
    enough = asyncio.get_running_loop().time() + 0.2  # many silence intervals, in which nothing must happen
    await eventually(lambda: asyncio.get_running_loop().time() > enough)
    assert not running.done()
    cluster["a"].resume.set()
    assert tokens(await asyncio.wait_for(running, 15)) == EXPECTED
    assert not any(cluster[name].requests for name in names[1:])


async def test_a_request_that_is_closed_in_a_silence_leaves_nothing_behind() -> None:
    cluster = Cluster("a", "b")
    await cluster.backend.refresh_view()
    cluster["a"].pauses_after = 1
    async with aclosing(cluster.backend.generate(REQUEST)) as chunks:
        await anext(chunks)
    assert cluster["a"].cancelled == 1
    assert not [task for task in asyncio.all_tasks() if task.get_name() == "verifier-silence"]
