"""What outlives a scheduler: named documents, written only by the leader."""

from __future__ import annotations

import logging
from typing import Protocol

from dspark_core.errors import ConfigError, UnavailableError

_log = logging.getLogger(__name__)


class DocumentStore(Protocol):
    """`load` and `save` raise UnavailableError while the store is down."""

    async def load(self) -> dict[str, str]: ...

    async def save(self, documents: dict[str, str], term: int) -> bool:
        """Stores nothing and returns False if `term` is not the leader's: it has been replaced."""
        ...

    async def close(self) -> None: ...


class MemoryDocumentStore:
    """Stores nothing: what would be stored is in the scheduler's memory anyway."""

    async def load(self) -> dict[str, str]:
        return {}

    async def save(self, documents: dict[str, str], term: int) -> bool:
        return True

    async def close(self) -> None:
        """Nothing is open."""


class Book(Protocol):
    """What is kept in documents."""

    def documents(self) -> dict[str, str]:
        """By name."""
        ...

    def take(self, name: str, document: str) -> None:
        """Takes over a stored document. Raises ConfigError, ValueError, TypeError or KeyError if it is
        malformed."""
        ...


class SavedDocuments:
    """A book's documents in a store. Tracks what the store is known to hold, so that only changes are
    written."""

    def __init__(self, book: Book, store: DocumentStore, what: str) -> None:
        """`what` names the documents in log messages."""
        self._book = book
        self._store = store
        self._what = what
        self._saved: dict[str, str] = {}
        self._refused = False

    async def load(self) -> None:
        """Has the book take over what an earlier leader stored, except for what it cannot parse. Leaves it as
        it is if the store is down."""
        try:
            documents = await self._store.load()
        except UnavailableError as error:
            _log.warning("stored %s were not read: %s", self._what, error)
            return
        self.forget()  # others may have saved since, and a new leader's first save fences off the old one
        for name, document in documents.items():
            try:
                self._book.take(name, document)
            except (ConfigError, ValueError, TypeError, KeyError) as error:
                _log.warning("skipping stored %s of %s: %r", self._what, name, error)

    def forget(self) -> None:
        """Makes the next `save` write everything: the store may have lost its content."""
        self._saved = {}

    async def save(self, term: int) -> None:
        """Stores what changed since the last call. Never fails."""
        saved = self._saved  # `forget` may replace it meanwhile: what is written now may be lost, too
        documents = self._book.documents()
        for dropped in saved.keys() - documents.keys():
            del saved[dropped]
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
            self.forget()  # another scheduler writes now
        self._refused = not stored

    async def close(self) -> None:
        await self._store.close()
