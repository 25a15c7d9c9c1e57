"""What services need of each other, in records. gRPC clients and in-process objects both fit.

Every method raises errors of `dspark_core.errors` only.
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
        """Plans for one verifier's reports, the newest first; old reports may be skipped."""
        ...


class SchedulerApi(RegistrationApi, CoordinationApi, Protocol):
    async def list_replicas(self, role: Role | None = None) -> tuple[Replica, ...]: ...

    async def assign(self, request: AssignRequest) -> Replica:
        """The verifier that should serve a request; UnavailableError when there is none."""
        ...
