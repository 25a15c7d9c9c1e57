"""Profiled passes use memory as served ones do: separate pages, written before, different each time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.engine.profiling import profile_passes
from dspark_core.engine.profiling.profile_passes import POOL_TOKENS, ProfilePasses
from dspark_core.engine.target.batch import Run
from dspark_core.engine.verdicts import acceptance
from tests.unit.engine.tiny import tiny_engine


class Recording:
    max_context_tokens = 1024
    page_tokens = 16

    def __init__(self, num_pages: int = 1000) -> None:
        self.num_pages = num_pages
        self.written: set[int] = set()

    def forward(self, runs: Sequence[Run]) -> torch.Tensor:
        for run in runs:
            assert run.start == 0
            assert len(run.token_ids) == len(run.pages) * self.page_tokens  # whole pages
            self.written.update(run.pages)
        return torch.zeros(1, 1)


def filled(num_pages: int = 1000) -> tuple[ProfilePasses, Recording]:
    engine = Recording(num_pages)
    passes = ProfilePasses(engine)
    while passes.write_chunk():
        pass
    return passes, engine


@given(st.integers(1, 32), st.integers(1, 8), st.integers(1, 120))
def test_each_request_reads_pages_of_its_own_that_were_written(requests, each, context) -> None:
    passes, engine = filled()
    runs = passes.runs(requests, requests * each, context)
    pages = [page for run in runs for page in run.pages]
    assert len(set(pages)) == len(pages)
    assert set(pages) <= engine.written
    assert all(len(run.pages) * engine.page_tokens >= run.start + len(run.token_ids) for run in runs)


def test_passes_go_round_the_pool_before_a_page_comes_again() -> None:
    passes, engine = filled()
    assert len(engine.written) * engine.page_tokens == POOL_TOKENS
    seen: list[int] = []
    while len(seen) < len(engine.written):
        seen += passes.runs(1, 1, 15)[0].pages
    assert set(seen) == engine.written
    assert passes.runs(1, 1, 15)[0].pages == seen[:1]


@pytest.mark.parametrize("num_pages", [2, 5, 40])
def test_a_small_cache_is_used_whole_and_never_page_0(num_pages) -> None:
    passes, engine = filled(num_pages)
    assert engine.written == set(range(1, num_pages))
    assert {page for run in passes.runs(4, 8, 100) for page in run.pages} <= engine.written


def test_a_real_engine_computes_them() -> None:
    passes = ProfilePasses(tiny_engine(num_pages=12))
    while passes.write_chunk():
        pass
    passes.verify(passes.runs(2, 5, 9))


def test_tokens_are_chosen_by_what_rounds_choose_with() -> None:
    """PyTorch's argmax would leave threads spinning on the cores of the next pass."""
    assert profile_passes.greedy_tokens is acceptance.greedy_tokens
