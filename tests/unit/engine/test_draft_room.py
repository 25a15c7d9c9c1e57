"""Room for draft tokens is distributed before anything but their number is known."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.engine.caches.block_manager import BlockManager
from dspark_core.engine.drafts.draft_room import within_batch, within_pages
from dspark_core.engine.protocols import DraftBlock, DraftItem, SparseDistribution
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.sequence import SequenceState
from dspark_core.records import RoundReport, SamplingParams, SpeculationOptions
from tests.unit.engine.tiny import ScriptedDrafts, make_loop, request, tiny_engine

LENGTHS = st.lists(st.integers(0, 15), max_size=12)


@given(LENGTHS, st.integers(-3, 80))
def test_shares_of_a_batch_are_as_even_as_can_be(wanted: list[int], room: int) -> None:
    shares = within_batch(wanted, room)
    assert sum(shares) == min(sum(wanted), max(room, 0))
    assert all(0 <= share <= length for share, length in zip(shares, wanted, strict=True))
    cut = [share for share, length in zip(shares, wanted, strict=True) if share < length]
    assert not cut or max(shares) - min(cut) <= 1


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 15)), max_size=8), st.integers(1, 20))
def test_shares_of_a_cache_can_all_be_reserved(asked: list[tuple[int, int]], spare: int) -> None:
    pages = sum(-(-tokens // 4) for tokens, _ in asked)
    manager = BlockManager(1 + pages + spare, 4)
    sequences = []
    for index, (tokens, _) in enumerate(asked):
        sequence = SequenceState(request(str(index), [1] * tokens), index, 0, 1000)
        assert sequence.reserve(manager, tokens)
        sequences.append(sequence)
    wanted = [length for _, length in asked]
    shares = within_pages(sequences, wanted, manager)
    needed = sum(manager.pages_for(t + n) - manager.pages_for(t) for t, n in asked)
    assert list(shares) == wanted or needed > spare
    for sequence, share, (tokens, length) in zip(sequences, shares, asked, strict=True):
        assert 0 <= share <= length
        assert sequence.reserve(manager, tokens + share)


class Capacity(FullPlanSource):
    """Verifies the `capacity` likeliest tokens."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.reports: list[RoundReport] = []

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        return super().plan(requests, self._capacity)

    def report(self, report: RoundReport) -> None:
        self.reports.append(report)


class Confident(ScriptedDrafts):
    def __init__(self, confidences: dict[str, tuple[float, ...]]) -> None:
        super().__init__(block_size=3)
        self._confidences = confidences

    def _block(self, item: DraftItem) -> DraftBlock:
        block = super()._block(item)
        assert isinstance(block.distribution, SparseDistribution)
        confidences = self._confidences[item.sequence_id]
        return DraftBlock(block.sequence_id, block.token_ids, confidences, block.distribution)


def verified(loop: RoundLoop, plans: Capacity) -> dict[str, int]:
    """Verify lengths of the first round in which both requests have drafts."""
    for name, prompt in (("a", [1, 2, 3, 4]), ("b", [4, 3, 2, 1])):
        sampled = SamplingParams(temperature=1.0)
        loop.submit(request(name, prompt, sampling=sampled, speculation=SpeculationOptions(lookup=False)))
    while not any(len(one.requests) == 2 and one.requests[0].drafted for one in plans.reports):
        loop.step()
    return {one.sequence_id: one.verify_length for one in plans.reports[-1].requests}


@pytest.mark.parametrize("tight", ["batch", "pages", "neither"])
def test_no_token_is_verified_for_what_comes_after_it(tight: str) -> None:
    """A capacity of four goes to the likeliest tokens: if `b`'s second token is unlikely, `a` gets three of
    them. With room for only three, cutting the finished plan would then drop `b`'s first token."""
    heads = set()
    for tail in (0.05, 0.97):
        plans = Capacity(4)
        drafts = Confident({"a": (0.9, 0.89, 0.88), "b": (0.85, tail, 0.05)})
        # Prompts and anchors take five pages each, and three are left.
        engine = tiny_engine(num_pages=1 + 10 + 3 if tight == "pages" else 40, page_tokens=1)
        batch, chunk = (5, 4) if tight == "batch" else (64, 8)
        limits = {"max_running": 2, "max_batch_tokens": batch, "prefill_chunk_tokens": chunk}
        loop = make_loop(engine, drafts, plans, **limits)
        heads.add(min(verified(loop, plans)["b"], 1))
    assert len(heads) == 1
