"""Caches too small to serve any request are refused at start; the error names the smallest that works."""

from __future__ import annotations

import logging
import os
from typing import Any

import pytest
import torch

from dspark_core.engine import building
from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.engine.caches.cache_size import LEAST_CONTEXT_TOKENS, PageNeeds, num_pages
from dspark_core.errors import ConfigError
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.zoo_paths import DEFAULT_DRAFTER

CPU = torch.device("cpu")
NEEDS = PageNeeds(name="m", page_bytes=2**18, page_tokens=16, context_tokens=2048)


def least_of(needs: PageNeeds) -> int:
    return needs.mib_for(min(LEAST_CONTEXT_TOKENS, needs.context_tokens))


@pytest.mark.parametrize(
    "needs",
    [
        NEEDS,
        PageNeeds(name="small", page_bytes=2**18, page_tokens=16, context_tokens=100),
        PageNeeds(name="d", page_bytes=2**18, page_tokens=16, context_tokens=2048, share=8, spare_tokens=7),
    ],
    ids=lambda needs: needs.name,
)
def test_the_least_that_is_told_is_taken_and_one_less_is_not(needs: PageNeeds) -> None:
    least = least_of(needs)
    pages = num_pages(least * 2**20, needs, CPU)
    tokens = min(LEAST_CONTEXT_TOKENS, needs.context_tokens)
    assert (pages - 1) * needs.page_tokens >= tokens + needs.spare_tokens
    with pytest.raises(ConfigError, match=rf"DSPARK_KV_CACHE_MB .* must be >= {least} .* got {least - 1},"):
        num_pages((least - 1) * 2**20, needs, CPU)


def test_a_cache_below_the_whole_context_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    whole = NEEDS.mib_for(NEEDS.context_tokens)
    with caplog.at_level(logging.WARNING):
        num_pages(whole * 2**20, NEEDS, CPU)
        assert not caplog.records
        num_pages((whole - 1) * 2**20, NEEDS, CPU)
    assert f"{whole} hold its whole context of 2048" in caplog.text
    assert "longer ones are refused" in caplog.text


def test_memory_is_compared_with_what_the_cache_takes() -> None:
    """A drafter takes an eighth of the setting, so the setting may be eight times the machine's memory."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    drafter = PageNeeds(name="d", page_bytes=2**18, page_tokens=16, context_tokens=2048, share=8)
    num_pages(8 * memory, drafter, CPU)
    most = f"<= {8 * memory // 2**20}, 8 times this machine's memory"
    with pytest.raises(ConfigError, match=most):
        num_pages(8 * memory + 2**20, drafter, CPU)


def test_more_than_the_machine_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"DSPARK_KV_CACHE_MB .* this machine's memory, got 1099511627776"):
        num_pages(2**60, NEEDS, CPU)


def test_neither_engine_starts_on_one_megabyte() -> None:
    options = EngineOptions(
        target_model=DEFAULT_MODEL, drafter=DEFAULT_DRAFTER, kv_cache_bytes=2**20, dtype="float32"
    )
    with pytest.raises(ConfigError, match=r"must be >= \d+ for 512 tokens of .*, got 1, which holds \d+"):
        build_target(options)
    with pytest.raises(ConfigError, match=r"must be >= \d+ for 128 tokens of drafter .*, got 1,"):
        build_drafter(options)


def test_a_drafter_may_have_a_cache_size_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []

    def counted(*given: Any) -> int:
        built.append(num_pages(*given))
        return built[-1]

    def drafter(**sizes: int) -> None:
        build_drafter(
            EngineOptions(target_model=DEFAULT_MODEL, drafter=DEFAULT_DRAFTER, dtype="float32", **sizes)
        )

    monkeypatch.setattr(building, "num_pages", counted)
    drafter(draft_cache_bytes=2**25)
    drafter(kv_cache_bytes=2**28)
    drafter(kv_cache_bytes=2**20, draft_cache_bytes=2**25)
    assert len(built) == 3
    assert len(set(built)) == 1
    with pytest.raises(ConfigError, match=r"DSPARK_DRAFT_CACHE_MB must be >= \d+ for 128 tokens of drafter"):
        drafter(draft_cache_bytes=2**16)
