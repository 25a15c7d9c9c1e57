"""What the scheduler learned is stored when it changes; what is stored and cannot be read is skipped."""

from services.scheduler.storage.documents import MemoryDocumentStore, SavedDocuments


class Store(MemoryDocumentStore):
    def __init__(self) -> None:
        self.documents: dict[str, str] = {}
        self.saves = 0

    async def load(self) -> dict[str, str]:
        return dict(self.documents)

    async def save(self, documents: dict[str, str], term: int) -> bool:
        self.saves += 1
        self.documents.update(documents)
        return True


class Book:
    """Holds whole numbers."""

    def __init__(self, **numbers: int) -> None:
        self.numbers = numbers

    def documents(self) -> dict[str, str]:
        return {name: str(number) for name, number in self.numbers.items()}

    def take(self, name: str, document: str) -> None:
        self.numbers[name] = int(document)


async def test_only_changes_are_stored():
    store, book = Store(), Book(a=1, b=2)
    saved = SavedDocuments(book, store, "numbers")
    for _ in range(2):
        await saved.save(1)
    assert (store.saves, store.documents) == (1, {"a": "1", "b": "2"})
    store.documents.clear()
    book.numbers["b"] = 3
    await saved.save(1)
    assert store.documents == {"b": "3"}


async def test_what_a_book_dropped_meanwhile_is_stored_when_it_is_back():
    store, book = Store(), Book(a=1)
    saved = SavedDocuments(book, store, "numbers")
    await saved.save(1)
    del book.numbers["a"]
    await saved.save(1)
    book.numbers["a"] = 1
    await saved.save(1)
    assert store.saves == 2


async def test_a_document_that_cannot_be_read_does_not_hide_the_others():
    store, book = Store(), Book()
    store.documents = {"a": "1", "b": "none", "c": "3"}
    await SavedDocuments(book, store, "numbers").load()
    assert book.numbers == {"a": 1, "c": 3}
