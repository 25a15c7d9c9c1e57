"""What the scheduler keeps beyond its life: documents by name, written by the leader alone."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

from dspark_core.errors import ConfigError, UnavailableError

_log = logging.getLogger(__name__)


class DocumentStore(Protocol):
    """`load` and `save` raise UnavailableError while the store is down."""

    async def load(self) -> dict[str, str]: ...

    async def save(self, documents: dict[str, str], term: int) -> bool:
        """False, and nothing is stored, where another term is the leader's: one that was replaced must not
        write."""
        ...

    async def close(self) -> None: ...


class MemoryDocumentStore:
    """Forgets with the process; what is stored is in memory anyway."""

    async def load(self) -> dict[str, str]:
        return {}

    async def save(self, documents: dict[str, str], term: int) -> bool:
        """There is nothing to keep them in."""
        return True

    async def close(self) -> None:
        """Nothing is open."""


class SavedDocuments:
    """A store and what of it is known to be there: only what changed is written."""

    def __init__(self, store: DocumentStore, what: str) -> None:
        """what: documents of the store are, for the log."""
        self._store = store
        self._what = what
        self._saved: dict[str, str] = {}
        self._refused = False

    async def load(self, take: Callable[[str, str], None]) -> None:
        """Has what an earlier leader stored taken over, by name and text; `take` may raise what reading a
        text that is none raises. A store that is down has nothing to take over."""
        try:
            documents = await self._store.load()
        except UnavailableError as error:
            _log.warning("stored %s were not read: %s", self._what, error)
            return
        self.forget()  # others may have saved since, and a new leader's save shuts out the one before
        for name, document in documents.items():
            try:
                take(name, document)
            except (ConfigError, ValueError, TypeError, KeyError) as error:
                _log.warning("skipping stored %s of %s: %r", self._what, name, error)

    def forget(self) -> None:
        """The store may have lost everything: the next `save` writes all that it is given."""
        self._saved = {}

    def forget_one(self, name: str) -> None:
        """It is kept no more; when it is again, it is written again."""
        self._saved.pop(name, None)

    async def save(self, documents: dict[str, str], term: int) -> None:
        """Stores what changed since the last time. Never fails."""
        saved = self._saved  # if it is forgotten meanwhile, what is written now may be lost, too
        changed = {name: text for name, text in documents.items() if saved.get(name) != text}
        if not changed:
            return
        try:
            stored = await self._store.save(changed, term)
        except UnavailableError as error:
            _log.debug("%s were not stored: %s", self._what, error)
            self.forget()
            return
        if stored:
            saved.update(changed)
        else:
            if not self._refused:
                _log.warning("%s were not stored: term %d is not the leader's", self._what, term)
            self.forget()  # others write meanwhile
        self._refused = not stored

    async def close(self) -> None:
        await self._store.close()
