"""Caches too small to serve any request are refused at start; the error names the smallest that works."""

from __future__ import annotations

import logging

import pytest
import torch

from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.engine.cache_size import LEAST_CONTEXT_TOKENS, PageNeeds, num_pages
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
