"""The time that following a grammar may take."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dspark_core.engine import grammars
from dspark_core.engine.grammars import REFILL, SHARED_SPARE_SECONDS, Budget, SequenceGrammar, SharedSpare
from tests.support.clock import ManualClock
from tests.unit.engine.tiny import VOCAB


class SlowMatcher:
    """Takes a while for each token: a share of what a question may take."""

    def __init__(self, share: float = 0.9) -> None:
        self.seconds, self.share = 0.0, share

    def deep_copy(self) -> SlowMatcher:
        return self  # it has no state but its clock

    def is_error(self) -> bool:
        return False

    def try_consume_tokens(self, token_ids: Sequence[int]) -> int:
        self.seconds += self.share * grammars.CALL_SECONDS * len(token_ids)
        return len(token_ids)


def test_what_took_its_time_to_generate_may_take_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    matcher = SlowMatcher()
    monkeypatch.setattr(grammars.time, "thread_time", lambda: matcher.seconds)
    generated = range(int(2 * grammars.SPARE_SECONDS / grammars.CALL_SECONDS))
    grammar = SequenceGrammar(matcher, VOCAB)
    grammar.follow(generated)
    assert grammar.problem is None
    grammar.take(generated)
    assert "too complex" in grammar.problem


@pytest.mark.parametrize(("share", "most"), [(0.001, 100), (0.3, 3), (0.6, 1), (40.0, 1)])
def test_draft_tokens_are_not_waited_for(monkeypatch: pytest.MonkeyPatch, share: float, most: int) -> None:
    """A dozen may take a second with some grammars, and all others of the batch wait meanwhile."""
    matcher = SlowMatcher(share)
    monkeypatch.setattr(grammars.time, "thread_time", lambda: matcher.seconds)
    grammar = SequenceGrammar(matcher, VOCAB)
    assert grammar.valid(range(100)) == most
    assert matcher.seconds <= 2 * max(share, 1.0) * grammars.CALL_SECONDS
    if share > 0.5:
        before = matcher.seconds
        assert grammar.valid(range(100)) == 0  # the question before took long
        assert matcher.seconds == before


def test_many_slow_grammars_may_not_do_what_one_may() -> None:
    clock = ManualClock()
    shared = SharedSpare(clock)
    shared.take(0.6 * SHARED_SPARE_SECONDS)
    assert not shared.used_up
    shared.take(0.6 * SHARED_SPARE_SECONDS)
    assert shared.used_up
    clock.advance(0.3 * SHARED_SPARE_SECONDS / REFILL)
    assert not shared.used_up
    clock.advance(1e6)
    shared.take(1.1 * SHARED_SPARE_SECONDS)  # it does not grow beyond
    assert shared.used_up


def test_a_grammar_that_is_only_slow_to_begin_goes_on_beside_slow_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    matcher, shared = SlowMatcher(5.0), SharedSpare(ManualClock())
    monkeypatch.setattr(grammars.time, "thread_time", lambda: matcher.seconds)
    shared.take(2 * SHARED_SPARE_SECONDS)
    grammar = SequenceGrammar(matcher, VOCAB, budget=Budget(shared))
    grammar.take((1,))
    assert grammar.problem is None
    grammar.take((1, 2))
    assert "too complex" in grammar.problem
