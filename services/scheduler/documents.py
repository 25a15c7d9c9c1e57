"""What the scheduler keeps beyond its life: documents by name, written by the leader alone."""

from __future__ import annotations

from typing import Protocol


class DocumentStore(Protocol):
    """`load` and `save` raise UnavailableError while the store is down."""

    async def load(self) -> dict[str, str]: ...

    async def save(self, documents: dict[str, str], term: int) -> None:
        """Does nothing unless `term` is the leader's: one that was replaced must not write."""
        ...

    async def close(self) -> None: ...


class MemoryDocumentStore:
    """Forgets with the process; what is stored is in memory anyway."""

    async def load(self) -> dict[str, str]:
        return {}

    async def save(self, documents: dict[str, str], term: int) -> None:
        """Nothing to keep them in."""

    async def close(self) -> None:
        """Nothing is open."""
