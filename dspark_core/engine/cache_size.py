"""How many pages a cache of given bytes has, and whether that is enough to serve anything."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass

import torch

from dspark_core.errors import ConfigError

_log = logging.getLogger(__name__)

LEAST_CONTEXT_TOKENS = 512
"""What a cache must hold, unless the context is shorter: a chat template, a question and an answer."""
_VARIABLE = "DSPARK_KV_CACHE_MB (--kv-cache-mb)"
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class PageNeeds:
    """Of one kind of cache."""

    name: str
    page_bytes: int
    page_tokens: int
    context_tokens: int
    """The longest context that a sequence may have."""
    share: int = 1
    """The cache gets one part in so many of the memory that was asked for."""
    spare_tokens: int = 0
    """That every sequence needs behind its context."""
    beyond: str = "longer ones are refused"
    """What becomes of contexts that do not fit."""

    def pages_for(self, tokens: int) -> int:
        """Page 0 is not for sequences."""
        return 1 + -(-(tokens + self.spare_tokens) // self.page_tokens)

    def mib_for(self, tokens: int) -> int:
        """The least that can be asked for so that one sequence of that length fits."""
        return -(-self.pages_for(tokens) * self.page_bytes * self.share // _MIB)


def num_pages(kv_cache_bytes: int, needs: PageNeeds, device: torch.device) -> int:
    """Warns when the longest context does not fit.

    Raises:
        ConfigError: not even a short request fits, or this machine has not so much memory.
    """
    _check_memory(kv_cache_bytes, device)
    pages = kv_cache_bytes // needs.share // needs.page_bytes
    held = max(0, (pages - 1) * needs.page_tokens - needs.spare_tokens)
    least = min(LEAST_CONTEXT_TOKENS, needs.context_tokens)
    whole = f"{needs.mib_for(needs.context_tokens)} hold its whole context of {needs.context_tokens}"
    if pages < needs.pages_for(least):
        raise ConfigError(
            f"{_VARIABLE} must be >= {needs.mib_for(least)} for {least} tokens of {needs.name}, got "
            f"{kv_cache_bytes / _MIB:g}, which holds {held}; {whole}"
        )
    if pages < needs.pages_for(needs.context_tokens):
        _log.warning(
            "the cache of %s holds a context of %d tokens, %s: raise %s; %s",
            needs.name,
            held,
            needs.beyond,
            _VARIABLE,
            whole,
        )
    return pages


def _check_memory(kv_cache_bytes: int, device: torch.device) -> None:
    """A GPU's own allocator tells; a CPU's promises pages that it does not have."""
    if device.type != "cpu":
        return
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if kv_cache_bytes > memory:
        raise ConfigError(
            f"{_VARIABLE} must be <= {memory // _MIB}, this machine's memory, got {kv_cache_bytes // _MIB}"
        )
