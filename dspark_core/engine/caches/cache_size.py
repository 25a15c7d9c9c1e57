"""Computes how many pages a cache of a given size has, and checks that they suffice to serve requests."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from dspark_core.errors import ConfigError

_log = logging.getLogger(__name__)

LEAST_CONTEXT_TOKENS = 512
"""A cache must hold at least this (or the whole context): a chat template, a question and an answer."""
CACHE_SETTING = "DSPARK_KV_CACHE_MB (--kv-cache-mb)"
DRAFT_CACHE_SETTING = "DSPARK_DRAFT_CACHE_MB"
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PageNeeds:
    """Requirements of one cache."""

    name: str
    page_bytes: int
    page_tokens: int
    context_tokens: int
    """The longest context a sequence may have."""
    setting: str = CACHE_SETTING
    """Where the memory is requested, for messages."""
    share: int = 1
    """The cache gets 1 / share of the requested memory."""
    spare_tokens: int = 0
    """Room that every sequence needs after its context."""
    beyond: str = "longer ones are refused"
    """What happens to contexts that do not fit, for messages."""

    def pages_for(self, tokens: int) -> int:
        """Includes page 0, which no sequence uses."""
        return 1 + -(-(tokens + self.spare_tokens) // self.page_tokens)

    def mib_for(self, tokens: int) -> int:
        """The smallest memory setting with which one sequence of that length fits."""
        return -(-self.pages_for(tokens) * self.page_bytes * self.share // _MIB)


def num_pages(kv_cache_bytes: int, needs: PageNeeds, device: torch.device) -> int:
    """Number of pages in the cache. Warns if the longest context does not fit.

    Raises:
        ConfigError: Not even a short request fits, or the machine does not have this much memory.
    """
    _check_memory(kv_cache_bytes, needs, device)
    pages = kv_cache_bytes // needs.share // needs.page_bytes
    held = max(0, (pages - 1) * needs.page_tokens - needs.spare_tokens)
    least = min(LEAST_CONTEXT_TOKENS, needs.context_tokens)
    whole = f"{needs.mib_for(needs.context_tokens)} hold its whole context of {needs.context_tokens}"
    if pages < needs.pages_for(least):
        raise ConfigError(
            f"{needs.setting} must be >= {needs.mib_for(least)} for {least} tokens of {needs.name}, got "
            f"{kv_cache_bytes / _MIB:g}, which holds {held}; {whole}"
        )
    if pages < needs.pages_for(needs.context_tokens):
        _log.warning(
            "the cache of %s holds a context of %d tokens, %s: raise %s; %s",
            needs.name,
            held,
            needs.beyond,
            needs.setting,
            whole,
        )
    return pages


def _check_memory(kv_cache_bytes: int, needs: PageNeeds, device: torch.device) -> None:
    """Checks a CPU only: its allocator overcommits memory, whereas a GPU's fails."""
    if device.type != "cpu":
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if kv_cache_bytes // needs.share > memory:
        part = "this machine's memory" if needs.share == 1 else f"{needs.share} times this machine's memory"
        raise ConfigError(
            f"{needs.setting} must be <= {memory * needs.share // _MIB}, {part}, got {kv_cache_bytes // _MIB}"
        )
