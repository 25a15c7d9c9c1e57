"""Manages KV pages: allocation, sharing of common prefixes, eviction.

Policy only, no tensors. A page holds `page_tokens` positions. Full pages of committed tokens are
shared by content; a page nobody references stays cached until its space is needed (LRU).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

_ROOT = 0
"""Parent content id of every sequence's first page."""


@dataclass(frozen=True, slots=True)
class CachedPrefix:
    """Cached pages that hold a prompt's leading tokens, and the content id of the last one."""

    pages: tuple[int, ...]
    content_id: int


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
        # collision would hand one user's context to another.
        self._page_of: dict[tuple[int, tuple[int, ...]], int] = {}
        self._key_of: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._content_id_of: dict[int, int] = {}
        self._next_content_id = _ROOT + 1

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
        """Drops one reference each; content stays cached until the space is needed."""
        # Deepest first, so that eviction takes the end of a prefix before its beginning.
        for page in reversed(pages):
            if self._references[page] < 1:
                raise ValueError(f"page {page} is released more often than it was taken")
            self._references[page] -= 1
            if self._references[page] == 0:
                if page in self._key_of:
                    self._idle[page] = None
                else:
                    self._free.append(page)

    def match_prefix(self, token_ids: Sequence[int]) -> CachedPrefix:
        """Takes a reference to each page of the longest cached prefix of full pages.

        Leaves at least one token uncovered, which the engine must compute to get logits.
        """
        pages: list[int] = []
        content_id = _ROOT
        for start in range(0, len(token_ids) - self.page_tokens, self.page_tokens):
            page = self.match_page(content_id, tuple(token_ids[start : start + self.page_tokens]))
            if page is None:
                break
            pages.append(page)
            content_id = self._content_id_of[page]
        return CachedPrefix(tuple(pages), content_id)

    def match_page(self, parent_content_id: int, token_ids: tuple[int, ...]) -> int | None:
        """Takes a reference on the page with these tokens behind that content; None: nobody published one."""
        page = self._page_of.get((parent_content_id, token_ids))
        if page is not None:
            self._references[page] += 1
            self._idle.pop(page, None)
        return page

    def content_id_of(self, page: int) -> int:
        """Of a published page."""
        return self._content_id_of[page]

    def publish(self, page: int, parent_content_id: int, token_ids: tuple[int, ...]) -> int:
        """Offers a full page of committed tokens for sharing; returns its content id.

        If the same content is already published, the page stays private and the existing content id is
        returned, so that later pages chain to it.
        """
        key = (parent_content_id, token_ids)
        existing = self._page_of.get(key)
        if existing is not None:
            return self._content_id_of[existing]
        content_id = self._next_content_id
        self._next_content_id += 1
        self._page_of[key] = page
        self._key_of[page] = key
        self._content_id_of[page] = content_id
        return content_id

    def _take_one(self) -> int:
        if self._free:
            return self._free.pop()
        page, _ = self._idle.popitem(last=False)
        del self._page_of[self._key_of.pop(page)]
        del self._content_id_of[page]
        return page


ROOT_CONTENT_ID = _ROOT
