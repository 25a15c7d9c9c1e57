"""gRPC clients of the verifier and the scheduler that take and return records, as `protocols` defines them.

A client borrows its channel: whoever opened it closes it.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import grpc.aio
from dspark_proto.v1 import scheduler_pb2, scheduler_pb2_grpc, verifier_pb2, verifier_pb2_grpc

from dspark_core.errors import DSparkError, InvalidRequestError
from dspark_core.records import (
    AssignRequest,
    GenerateChunk,
    GenerateRequest,
    Replica,
    Role,
    RoundReport,
    VerifierDescription,
    VerifyPlan,
)
from services.common import cluster_convert, convert
from services.common.rpc_errors import from_rpc_error

_Message = TypeVar("_Message")
_Record = TypeVar("_Record")

# Deadline of a Coordinate stream, after which its owner opens a new one.
COORDINATE_SECONDS = 3600.0


class VerifierClient:
    def __init__(self, channel: grpc.aio.Channel, *, timeout_seconds: float = 5.0) -> None:
        self._stub: Any = verifier_pb2_grpc.VerifierServiceStub(channel)
        self._timeout_seconds = timeout_seconds

    async def describe(self) -> VerifierDescription:
        with _errors():
            response = await self._stub.Describe(
                verifier_pb2.DescribeVerifierRequest(), timeout=self._timeout_seconds
            )
        return _read(convert.verifier_description_from_proto, response)

    async def generate(
        self, request: GenerateRequest, *, deadline_seconds: float
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Streams one completion; closing the iterator (`aclosing`) cancels the call at once."""
        call = self._stub.Generate(convert.generate_request_to_proto(request), timeout=deadline_seconds)
        with _errors(), _cancelled_on_exit(call):
            async for message in call:
                yield _read(convert.generate_chunk_from_proto, message)


class SchedulerClient:
    def __init__(self, channel: grpc.aio.Channel, *, timeout_seconds: float = 2.0) -> None:
        self._stub: Any = scheduler_pb2_grpc.SchedulerServiceStub(channel)
        self._timeout_seconds = timeout_seconds

    async def register(self, replica: Replica) -> float:
        message = scheduler_pb2.RegisterRequest(replica=cluster_convert.replica_to_proto(replica))
        with _errors():
            response = await self._stub.Register(message, timeout=self._timeout_seconds)
        return float(response.lease_seconds)

    async def deregister(self, replica_id: str) -> None:
        message = scheduler_pb2.DeregisterRequest(replica_id=replica_id)
        with _errors():
            await self._stub.Deregister(message, timeout=self._timeout_seconds)

    async def list_replicas(self, role: Role | None = None) -> tuple[Replica, ...]:
        message = scheduler_pb2.ListReplicasRequest(role=cluster_convert.role_to_proto(role))
        with _errors():
            response = await self._stub.ListReplicas(message, timeout=self._timeout_seconds)
        return tuple(_read(cluster_convert.replica_from_proto, replica) for replica in response.replicas)

    async def assign(self, request: AssignRequest) -> Replica:
        message = cluster_convert.assign_request_to_proto(request)
        with _errors():
            timeout = self._timeout_seconds + request.wait_seconds
            response = await self._stub.Assign(message, timeout=timeout)
        return _read(cluster_convert.replica_from_proto, response.replica)

    async def coordinate(self, reports: AsyncIterable[RoundReport]) -> AsyncGenerator[VerifyPlan, None]:
        """Sends reports and yields plans until either side ends; closing the iterator cancels."""

        async def messages() -> AsyncIterator[scheduler_pb2.RoundReport]:
            async for report in reports:
                yield cluster_convert.round_report_to_proto(report)

        call = self._stub.Coordinate(messages(), timeout=COORDINATE_SECONDS)
        with _errors(), _cancelled_on_exit(call):
            async for message in call:
                yield _read(cluster_convert.verify_plan_from_proto, message)


def _read(convert_answer: Callable[[_Message], _Record], message: _Message) -> _Record:
    """A malformed answer is the callee's fault and must not look like an invalid request of the caller's."""
    try:
        return convert_answer(message)
    except InvalidRequestError as error:
        raise DSparkError(f"unreadable answer: {error}") from error


@contextmanager
def _errors() -> Iterator[None]:
    try:
        yield
    except grpc.aio.AioRpcError as error:
        raise from_rpc_error(error) from error


@contextmanager
def _cancelled_on_exit(call: grpc.aio.Call) -> Iterator[None]:
    try:
        yield
    finally:
        call.cancel()  # no effect on a call that has ended
