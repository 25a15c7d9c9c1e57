"""Manages KV pages: allocation, sharing of common prefixes, eviction.

Policy only, no tensors. A page holds `page_tokens` positions. Full pages of committed tokens are
shared by content among requests of the same cache salt, already before they are filled; a filled page nobody
references stays cached until its space is needed (LRU).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import TypeAlias

ContentId: TypeAlias = int | str
"""What a sequence holds up to the end of a page: a number given out when that page was offered. Before the
first page: the request's cache salt."""

ROOT_CONTENT_ID = 0
"""Parent content id of the first page of every sequence without a salt."""


class BlockManager:
    """Reference-counted pages with an exact-match prefix cache.

    Page 0 is never allocated: padding reads and writes it.
    """

    def __init__(self, num_pages: int, page_tokens: int) -> None:
        if num_pages < 2:
            raise ValueError(f"num_pages must be >= 2, got {num_pages}")
        if page_tokens < 1:
            raise ValueError(f"page_tokens must be >= 1, got {page_tokens}")
        self.num_pages = num_pages
        self.page_tokens = page_tokens
        self._free = list(range(num_pages - 1, 0, -1))
        self._references = [0] * num_pages
        self._idle: OrderedDict[int, None] = OrderedDict()  # cached, unreferenced, oldest first
        # Content is identified exactly, by (parent content, tokens): a hash could collide, and a
        # collision would hand one user's context to another. So would a number given to a salt: the salt
        # itself is the root.
        self._page_of: dict[tuple[ContentId, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[ContentId, tuple[int, ...]]] = {}
        self._content_id_of: dict[int, int] = {}
        self._unfilled: set[int] = set()  # announced: referenced, with a key, not computed yet
        self._next_content_id = ROOT_CONTENT_ID + 1

    @property
    def available_pages(self) -> int:
        """Pages that can be allocated now, idle cached ones included."""
        return len(self._free) + len(self._idle)

    @property
    def usable_pages(self) -> int:
        return self.num_pages - 1

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)

    def allocate(self, count: int) -> list[int] | None:
        """Allocates `count` pages with one reference each; None, without any change, if there are too few.

        In ascending order, since kernels read a context on consecutive pages as one stream.
        """
        if count > self.available_pages:
            return None
        pages = sorted(self._take_one() for _ in range(count))
        for page in pages:
            self._references[page] = 1
        return pages

    def release(self, pages: Sequence[int]) -> None:
        """Drops one reference each; content stays cached until the space is needed, unless it was only
        announced."""
        # Deepest first, so that eviction takes the end of a prefix before its beginning.
        for page in reversed(pages):
            if self._references[page] < 1:
                raise ValueError(f"page {page} is released more often than it was taken")
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._unfilled:
                    self._forget_content(page)
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def match_prefix(self, token_ids: Sequence[int], root: ContentId = ROOT_CONTENT_ID) -> list[int]:
        """Takes a reference to each page of the longest prefix of full pages behind `root` that are cached or
        announced.

        Leaves at least one token uncovered, which the engine must compute to get logits. Announced pages
        come after all filled ones, since a page is filled after those before it.
        """
        pages: list[int] = []
        content_id = root
        for token_block in self._shareable(token_ids):
            page = self._page_of.get((content_id, token_block))
            if page is None:
                break
            self._references[page] += 1
            self._idle.pop(page, None)
            pages.append(page)
            content_id = self._content_id_of[page]
        return pages

    def announce(
        self, pages: Sequence[int], matched: int, token_ids: Sequence[int], root: ContentId = ROOT_CONTENT_ID
    ) -> None:
        """Offers pages that are going to be filled with these tokens, all but the first `matched`, which
        `match_prefix` gave.

        Whoever takes one shares its space at once, and reads it once it is filled. Any of those who hold it
        may fill it, so the one that announced it may give it up.
        """
        content_id = self._content_id_of[pages[matched - 1]] if matched else root
        rest = self._shareable(token_ids, first=matched)
        for page, token_block in zip(pages[matched:], rest, strict=False):
            content_id = self._offer(page, (content_id, token_block))
            self._unfilled.add(page)

    def is_filled(self, page: int) -> bool:
        """Whether it is a shared page that can be read."""
        return page in self._key_of and page not in self._unfilled

    def content_id_of(self, page: int) -> int:
        """Of a published or announced page."""
        return self._content_id_of[page]

    def publish(self, page: int, parent_content_id: ContentId, token_ids: tuple[int, ...]) -> int:
        """Offers a full page of committed and computed tokens for sharing; returns its content id.

        If another page has or will have the same content, this one stays private and the existing content id
        is returned, so that later pages chain to it.
        """
        key = (parent_content_id, token_ids)
        known = self._page_of.get(key)
        if known is None:
            return self._offer(page, key)
        if known == page:
            self._unfilled.discard(page)
        return self._content_id_of[known]

    def _shareable(self, token_ids: Sequence[int], *, first: int = 0) -> Iterator[tuple[int, ...]]:
        """The tokens of each full page from page `first` on, except one that holds the last token."""
        size = self.page_tokens
        for start in range(first * size, len(token_ids) - size, size):
            yield tuple(token_ids[start : start + size])

    def _offer(self, page: int, key: tuple[ContentId, tuple[int, ...]]) -> int:
        content_id = self._next_content_id
        self._next_content_id += 1
        self._page_of[key] = page
        self._key_of[page] = key
        self._content_id_of[page] = content_id
        return content_id

    def _forget_content(self, page: int) -> None:
        del self._page_of[self._key_of.pop(page)]
        del self._content_id_of[page]
        self._unfilled.discard(page)

    def _take_one(self) -> int:
        if self._free:
            return self._free.pop()
        page, _ = self._idle.popitem(last=False)
        self._forget_content(page)
        return page
