import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.engine.caches.block_manager import ROOT_CONTENT_ID, BlockManager


def publish_all(manager: BlockManager, pages: list[int], tokens: list[int]) -> None:
    content = ROOT_CONTENT_ID
    size = manager.page_tokens
    for index, page in enumerate(pages[: len(tokens) // size]):
        content = manager.publish(page, content, tuple(tokens[index * size : (index + 1) * size]))


def test_allocation_is_all_or_nothing() -> None:
    manager = BlockManager(5, 4)
    assert manager.allocate(5) is None
    assert manager.available_pages == 4
    pages = manager.allocate(4)
    assert pages is not None
    assert len(set(pages)) == 4
    assert 0 not in pages


def test_a_cached_prefix_is_found_after_release_and_shared_by_two() -> None:
    manager = BlockManager(8, 2)
    tokens = [1, 2, 3, 4, 5]
    pages = manager.allocate(3)
    assert pages is not None
    publish_all(manager, pages, tokens)
    manager.release(pages)
    first, second = manager.match_prefix(tokens), manager.match_prefix([1, 2, 3, 4, 9])
    assert first == second == pages[:2]
    assert manager.match_prefix([1, 9, 3, 4, 5]) == []


def test_a_prefix_always_leaves_one_token_to_compute() -> None:
    manager = BlockManager(8, 2)
    pages = manager.allocate(2)
    assert pages is not None
    publish_all(manager, pages, [1, 2, 3, 4])
    assert manager.match_prefix([1, 2, 3, 4]) == [pages[0]]


def test_idle_pages_are_evicted_oldest_and_deepest_first() -> None:
    manager = BlockManager(4, 1)
    pages = manager.allocate(3)
    assert pages is not None
    publish_all(manager, pages, [7, 8, 9])
    manager.release(pages)
    assert manager.allocate(1) == [pages[2]]
    assert manager.match_prefix([7, 8, 9, 10]) == pages[:2]


def test_pages_of_one_allocation_ascend_whatever_was_freed_before() -> None:
    manager = BlockManager(9, 4)
    first, second = manager.allocate(3), manager.allocate(4)
    assert first is not None
    assert second is not None
    content = ROOT_CONTENT_ID
    for number, page in enumerate(second):
        content = manager.publish(page, content, (number,) * 4)
    manager.release(first)
    manager.release(second)
    assert manager.allocate(8) == [1, 2, 3, 4, 5, 6, 7, 8]


def test_releasing_twice_is_an_error() -> None:
    manager = BlockManager(3, 1)
    pages = manager.allocate(1)
    assert pages is not None
    manager.release(pages)
    with pytest.raises(ValueError, match=f"page {pages[0]}"):
        manager.release(pages)


def test_announced_pages_are_shared_at_once_and_cached_once_they_are_filled() -> None:
    manager = BlockManager(8, 2)
    tokens = [1, 2, 3, 4, 5]
    pages = manager.allocate(3)
    assert pages is not None
    manager.announce(pages, 0, tokens)
    shared = manager.match_prefix(tokens)
    assert shared == pages[:2]  # the last token's page is nobody else's
    manager.publish(pages[0], ROOT_CONTENT_ID, (1, 2))
    assert [manager.is_filled(page) for page in pages] == [True, False, False]
    manager.release(pages)
    assert manager.available_pages == 5  # the other one holds both, and may fill the second
    manager.release(shared)
    assert manager.available_pages == 7
    assert manager.match_prefix(tokens) == pages[:1]  # nobody is left to fill the second


ACTIONS = st.one_of(
    st.tuples(st.just("start"), st.lists(st.integers(0, 1), min_size=1, max_size=9)),
    st.tuples(st.just("fill"), st.integers(0, 5)),
    st.tuples(st.just("end"), st.integers(0, 5)),
)


class Sequence:
    """Takes pages, fills them one after the other, and gives them up."""

    def __init__(self, manager: BlockManager, tokens: list[int], content: dict[int, list[int]]) -> None:
        self.manager, self.tokens, self.content = manager, tokens, content
        self.pages = manager.match_prefix(tokens)
        matched = len(self.pages)
        fresh = manager.allocate(manager.pages_for(len(tokens)) - matched)
        if fresh is None:
            manager.release(self.pages)
            self.pages = []
        else:
            self.pages += fresh
            manager.announce(self.pages, matched, tokens)
            for page in fresh:
                content.pop(page, None)
        self.filled = 0
        self.content_id = ROOT_CONTENT_ID

    def skip(self) -> None:
        while self.filled < len(self.pages) and self.manager.is_filled(self.pages[self.filled]):
            page = self.pages[self.filled]
            assert self.content[page] == self.tokens[: (self.filled + 1) * 2], "not what it says it holds"
            self.content_id = self.manager.content_id_of(page)
            self.filled += 1

    def fill(self) -> None:
        self.skip()
        start = self.filled * 2
        if start + 2 <= len(self.tokens):
            page = self.pages[self.filled]
            self.content[page] = self.tokens[: start + 2]
            self.content_id = self.manager.publish(
                page, self.content_id, tuple(self.tokens[start : start + 2])
            )
            self.filled += 1


@given(st.lists(ACTIONS, max_size=60))
def test_pages_are_conserved_and_never_hold_two_contents(actions: list[tuple[str, object]]) -> None:
    """Sequences come, compute and go; a page that can be read must hold exactly the requested tokens."""
    manager = BlockManager(9, 2)
    content: dict[int, list[int]] = {}
    live: list[Sequence] = []
    for kind, value in actions:
        if kind == "start":
            one = Sequence(manager, list(value), content)  # type: ignore[call-overload]
            live += [one] if one.pages else []
        elif live and kind == "fill":
            live[int(value) % len(live)].fill()  # type: ignore[call-overload]
        elif live:
            manager.release(live.pop(int(value) % len(live)).pages)  # type: ignore[call-overload]
        for one in live:
            one.skip()
        in_use = {page for one in live for page in one.pages}
        assert manager.available_pages == manager.usable_pages - len(in_use)
