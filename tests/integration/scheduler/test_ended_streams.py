"""Coordinate streams that a scheduler ends while a verifier sends."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator

from dspark_core.errors import DSparkError, NotLeaderError, UnavailableError
from dspark_core.records import RoundReport, VerifyPlan
from services.common.channels import open_channel
from services.common.clients import SchedulerClient
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.scheduler.servicer import SchedulerServicer
from tests.support.polling import exhaust

STREAMS, AT_A_TIME = 25, 8


class Resigning:
    """Leads for a few reports."""

    async def coordinate(self, reports: AsyncIterable[RoundReport]) -> AsyncGenerator[VerifyPlan, None]:
        async for report in reports:
            yield VerifyPlan(based_on_round=report.round, draft_token_capacity=1)
            if report.round % 7 == 0:
                raise NotLeaderError("this scheduler leads no more")


async def reports() -> AsyncIterator[RoundReport]:
    for round_ in range(1, 1000):
        yield RoundReport(replica_id="v", round=round_)
        await asyncio.sleep(0)


async def test_a_verifier_is_told_that_the_scheduler_is_lost() -> None:
    """gRPC loses the status of some of these streams, and has them fail with one of its own."""
    options = ServerOptions(port=0, host="127.0.0.1")
    server = GrpcServer(options, [SchedulerServicer(Resigning()).register], Telemetry(service="scheduler"))
    channel = open_channel(f"127.0.0.1:{await server.start()}")
    failures: list[DSparkError] = []

    async def verifier() -> None:
        for _ in range(STREAMS):
            try:
                await exhaust(SchedulerClient(channel).coordinate(reports()))
            except DSparkError as error:
                failures.append(error)

    await asyncio.gather(*(verifier() for _ in range(AT_A_TIME)))
    await channel.close()
    await server.stop()
    assert len(failures) == STREAMS * AT_A_TIME
    assert all(isinstance(failure, UnavailableError) for failure in failures), failures
