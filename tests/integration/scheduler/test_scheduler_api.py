"""One contract for the scheduler in process and over gRPC."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest
from grpc import StatusCode
from grpc.aio import AioRpcError, Channel

from dspark_core.errors import InvalidRequestError, NoVerifierError
from dspark_core.records import AssignRequest, Replica, RequestSurvival, Role, RoundReport, StepTime
from services.common.clients import SchedulerClient
from services.common.protocols import SchedulerApi
from services.scheduler.scheduler import Scheduler
from tests.support.clock import ManualClock
from tests.support.polling import exhaust

LEASE_SECONDS = 10.0


@pytest.fixture(params=["in_process", "grpc"])
def api(request: pytest.FixtureRequest, scheduler: Scheduler, client: SchedulerClient) -> SchedulerApi:
    return scheduler if request.param == "in_process" else client


def _replica(replica_id: str, role: Role = Role.VERIFIER, **fields) -> Replica:
    return Replica(replica_id=replica_id, role=role, address=f"{replica_id}:50053", model="m", **fields)


async def test_registered_replicas_are_listed_as_they_are(api: SchedulerApi):
    verifier = _replica("v", running_requests=3, waiting_requests=1, free_kv_fraction=0.25)
    drafter = _replica("d", Role.DRAFTER, draining=True)
    assert await api.register(verifier) == LEASE_SECONDS
    assert await api.register(drafter) == LEASE_SECONDS
    assert await api.list_replicas() == (drafter, verifier)
    assert await api.list_replicas(Role.DRAFTER) == (drafter,)


async def test_leases_run_out_and_renewals_keep_them(api: SchedulerApi, clock: ManualClock):
    await api.register(_replica("kept"))
    await api.register(_replica("lost"))
    clock.advance(LEASE_SECONDS * 0.7)
    await api.register(_replica("kept"))
    clock.advance(LEASE_SECONDS * 0.7)
    assert await api.list_replicas() == (_replica("kept"),)


async def test_deregistered_replicas_are_gone_and_unknown_ones_are_ignored(api: SchedulerApi):
    await api.register(_replica("v"))
    await api.deregister("v")
    await api.deregister("never-was")
    assert await api.list_replicas() == ()


async def test_requests_go_to_the_least_loaded_and_skip_the_excluded(api: SchedulerApi):
    await api.register(_replica("busy", running_requests=5))
    await api.register(_replica("idle"))
    assert await api.assign(AssignRequest(request_id="r", model="m", prompt_tokens=10)) == _replica("idle")
    chosen = await api.assign(AssignRequest(request_id="r", model="m", exclude_replica_ids=("idle",)))
    assert chosen.replica_id == "busy"


async def test_without_a_verifier_the_answer_says_so(api: SchedulerApi):
    await api.register(_replica("d", Role.DRAFTER))
    with pytest.raises(NoVerifierError, match="no verifier serves model 'm' now"):
        await api.assign(AssignRequest(request_id="r", model="m"))


PROFILE = tuple(
    StepTime(requests=1, batch_tokens=tokens, context_tokens=0, seconds=seconds)
    for tokens, seconds in ((1, 0.02), (5, 0.021), (6, 0.04), (7, 0.06))
)


def _report(round_: int, replica_id: str = "v") -> RoundReport:
    return RoundReport(
        replica_id=replica_id,
        round=round_,
        requests=(
            RequestSurvival(sequence_id="a", survival=(0.9, 0.8, 0.1), verify_length=2, accepted=1),
            RequestSurvival(sequence_id="b", survival=(0.5, 0.25), verify_length=0, accepted=0),
        ),
        batch_tokens=4,
        step_seconds=0.02,
        # Nearly free up to five tokens, then each costs as much as a whole step.
        profile=PROFILE if round_ == 1 else (),
    )


class Reports:
    """Reports a test sends one at a time, as a verifier does."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[RoundReport | None] = asyncio.Queue()

    def send(self, report: RoundReport) -> None:
        self._queue.put_nowait(report)

    def end(self) -> None:
        self._queue.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[RoundReport]:
        while (report := await self._queue.get()) is not None:
            yield report


async def test_each_report_is_answered_by_a_plan_for_its_round(api: SchedulerApi):
    reports = Reports()
    async with asyncio.timeout(15), aclosing(api.coordinate(reports)) as plans:
        for round_ in (1, 2, 3):
            reports.send(_report(round_))
            plan = await anext(plans)
            # Two requests and the three likeliest drafts fill the five cheap tokens.
            assert (plan.based_on_round, plan.draft_token_capacity) == (round_, 3)
        reports.end()
        with pytest.raises(StopAsyncIteration):
            await anext(plans)


async def test_a_restarted_verifier_counts_from_the_beginning(api: SchedulerApi):
    for _ in range(2):
        reports = Reports()
        async with asyncio.timeout(15), aclosing(api.coordinate(reports)) as plans:
            reports.send(_report(1))
            assert (await anext(plans)).based_on_round == 1


async def test_a_report_of_an_older_round_gets_no_plan(api: SchedulerApi):
    reports = Reports()
    async with asyncio.timeout(15), aclosing(api.coordinate(reports)) as plans:
        for round_ in (5, 4, 6):
            reports.send(_report(round_))
        rounds = [(await anext(plans)).based_on_round]
        if rounds == [5]:  # in process all three are read before the first plan
            rounds.append((await anext(plans)).based_on_round)
        assert rounds in ([5, 6], [6])


async def test_a_stream_of_two_verifiers_ends_with_an_error(api: SchedulerApi):
    reports = Reports()
    reports.send(_report(1))
    reports.send(_report(2, replica_id="w"))
    with pytest.raises(InvalidRequestError, match="must stay 'v'") as caught:
        await exhaust(api.coordinate(reports))
    assert caught.value.field == "replica_id"


async def test_a_report_that_cannot_be_parsed_ends_the_stream_as_the_callers_mistake(channel: Channel):
    async def reports() -> AsyncIterator[bytes]:
        yield b"\xff\xff\xff"

    call = channel.stream_stream("/dspark.v1.SchedulerService/Coordinate")
    with pytest.raises(AioRpcError, match="malformed request: Error parsing") as caught:
        await exhaust(call(reports(), timeout=20))
    assert caught.value.code() is StatusCode.INVALID_ARGUMENT
