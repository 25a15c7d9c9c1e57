"""The time that following a grammar may take."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from dspark_core.engine import grammars
from dspark_core.engine.grammars import SequenceGrammar
from tests.unit.engine.tiny import VOCAB


class SlowMatcher:
    """Takes a while for each token, though less than a token may."""

    seconds = 0.0

    def is_error(self) -> bool:
        return False

    def try_consume_tokens(self, token_ids: Sequence[int]) -> int:
        self.seconds += 0.9 * grammars.CALL_SECONDS * len(token_ids)
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
