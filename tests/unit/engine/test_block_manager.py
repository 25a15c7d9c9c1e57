import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.engine.block_manager import ROOT_CONTENT_ID, BlockManager


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
    assert first.pages == second.pages == tuple(pages[:2])
    assert manager.match_prefix([1, 9, 3, 4, 5]).pages == ()


def test_a_prefix_always_leaves_one_token_to_compute() -> None:
    manager = BlockManager(8, 2)
    pages = manager.allocate(2)
    assert pages is not None
    publish_all(manager, pages, [1, 2, 3, 4])
    assert manager.match_prefix([1, 2, 3, 4]).pages == (pages[0],)


def test_idle_pages_are_evicted_oldest_and_deepest_first() -> None:
    manager = BlockManager(4, 1)
    pages = manager.allocate(3)
    assert pages is not None
    publish_all(manager, pages, [7, 8, 9])
    manager.release(pages)
    assert manager.allocate(1) == [pages[2]]
    assert manager.match_prefix([7, 8, 9, 10]).pages == (pages[0], pages[1])


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


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("start"), st.lists(st.integers(0, 1), min_size=1, max_size=9)),
            st.tuples(st.just("end"), st.integers(0, 5)),
        ),
        max_size=40,
    )
)
def test_pages_are_conserved_and_never_hold_two_contents(actions: list[tuple[str, object]]) -> None:
    """Sequences come and go; a matched page must hold exactly the requested tokens."""
    manager = BlockManager(9, 2)
    content: dict[int, tuple[int, ...]] = {}
    live: list[tuple[list[int], int]] = []
    for kind, value in actions:
        if kind == "start":
            tokens = list(value)  # type: ignore[call-overload]
            prefix = manager.match_prefix(tokens)
            for index, page in enumerate(prefix.pages):
                assert content[page] == tuple(tokens[: (index + 1) * 2])
            fresh = manager.allocate(manager.pages_for(len(tokens)) - len(prefix.pages))
            if fresh is None:
                manager.release(prefix.pages)
                continue
            pages = [*prefix.pages, *fresh]
            used = [page for other, _ in live for page in other]
            assert not set(fresh) & set(used)
            content_id = prefix.content_id
            for index in range(len(prefix.pages), len(tokens) // 2):
                content[pages[index]] = tuple(tokens[: (index + 1) * 2])
                content_id = manager.publish(
                    pages[index], content_id, tuple(tokens[index * 2 : index * 2 + 2])
                )
            live.append((pages, 0))
        elif live:
            pages, _ = live.pop(int(value) % len(live))  # type: ignore[call-overload]
            manager.release(pages)
        in_use = {page for pages, _ in live for page in pages}
        assert manager.available_pages == manager.usable_pages - len(in_use)
