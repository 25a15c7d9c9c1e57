"""What services need of each other, in terms of records; gRPC clients and in-process objects implement it.

Methods raise only errors of `dspark_core.errors`.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterable
from typing import Protocol

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


class VerifierApi(Protocol):
    async def describe(self) -> VerifierDescription: ...

    def generate(
        self, request: GenerateRequest, *, deadline_seconds: float
    ) -> AsyncGenerator[GenerateChunk, None]:
        """Streams one completion. Closing the iterator cancels the request and frees its pages."""
        ...


class RegistrationApi(Protocol):
    async def register(self, replica: Replica) -> float:
        """Registers or renews; returns the lease in seconds."""
        ...

    async def deregister(self, replica_id: str) -> None:
        """Forgets a replica; unknown ids are ignored."""
        ...


class CoordinationApi(Protocol):
    def coordinate(self, reports: AsyncIterable[RoundReport]) -> AsyncGenerator[VerifyPlan, None]:
        """Plans for one verifier's reports; if several are waiting, only the newest is planned for."""
        ...


class SchedulerApi(RegistrationApi, CoordinationApi, Protocol):
    async def list_replicas(self, role: Role | None = None) -> tuple[Replica, ...]: ...

    async def assign(self, request: AssignRequest) -> Replica:
        """The verifier that should serve a request. Raises UnavailableError if there is none."""
        ...
