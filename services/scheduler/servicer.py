"""Serves the scheduler over gRPC: converts, calls, converts back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any, TypeAlias

import grpc.aio
from dspark_proto.v1 import scheduler_pb2, scheduler_pb2_grpc

from dspark_core.cluster.limits import MOST_VERIFIERS
from dspark_core.errors import InvalidRequestError
from dspark_core.records import RoundReport
from services.common import cluster_convert
from services.common.protocols import SchedulerApi

Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"

_SERVICE: str = scheduler_pb2.DESCRIPTOR.services_by_name["SchedulerService"].full_name
CALLS_APART = {f"/{_SERVICE}/{method}": MOST_VERIFIERS for method in ("Coordinate", "Register", "Deregister")}
"""Most calls at a time of each method that counts apart. Every verifier has a stream while it runs, and
neither streams nor requests that wait for a verifier may keep replicas from coming and going."""


class SchedulerServicer(scheduler_pb2_grpc.SchedulerServiceServicer):
    def __init__(self, scheduler: SchedulerApi) -> None:
        self._scheduler = scheduler

    def register(self, server: grpc.aio.Server) -> str:
        scheduler_pb2_grpc.add_SchedulerServiceServicer_to_server(self, server)
        return _SERVICE

    async def Register(
        self, request: scheduler_pb2.RegisterRequest, context: Context
    ) -> scheduler_pb2.RegisterResponse:
        lease_seconds = await self._scheduler.register(cluster_convert.replica_from_proto(request.replica))
        return scheduler_pb2.RegisterResponse(lease_seconds=lease_seconds)

    async def Deregister(
        self, request: scheduler_pb2.DeregisterRequest, context: Context
    ) -> scheduler_pb2.DeregisterResponse:
        await self._scheduler.deregister(_required(request.replica_id, "replica_id"))
        return scheduler_pb2.DeregisterResponse()

    async def ListReplicas(
        self, request: scheduler_pb2.ListReplicasRequest, context: Context
    ) -> scheduler_pb2.ListReplicasResponse:
        replicas = await self._scheduler.list_replicas(cluster_convert.role_from_proto(request.role))
        return scheduler_pb2.ListReplicasResponse(
            replicas=[cluster_convert.replica_to_proto(replica) for replica in replicas]
        )

    async def Assign(
        self, request: scheduler_pb2.AssignRequest, context: Context
    ) -> scheduler_pb2.AssignResponse:
        replica = await self._scheduler.assign(cluster_convert.assign_request_from_proto(request))
        return scheduler_pb2.AssignResponse(replica=cluster_convert.replica_to_proto(replica))

    async def Coordinate(
        self, request_iterator: AsyncIterator[scheduler_pb2.RoundReport], context: Context
    ) -> AsyncIterator[scheduler_pb2.VerifyPlan]:
        async def reports() -> AsyncIterator[RoundReport]:
            async for message in request_iterator:
                yield cluster_convert.round_report_from_proto(message)

        async with aclosing(self._scheduler.coordinate(reports())) as plans:
            async for plan in plans:
                yield cluster_convert.verify_plan_to_proto(plan)


def _required(value: str, field: str) -> str:
    if not value:
        raise InvalidRequestError(f"{field} must be non-empty, got ''", field=field)
    return value
