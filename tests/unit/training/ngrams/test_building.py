"""Tables from answers: what they say, what they leave out, and how sure they are."""

from __future__ import annotations

import random
from statistics import mean

import pytest

from dspark_core.algorithms.lookup_chain import lookup_chain
from dspark_core.algorithms.suffix_match import SuffixIndex
from dspark_core.errors import ConfigError
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.ngrams import building
from dspark_core.training.ngrams.building import NgramOptions, build_table, train_table


def spoken(count: int, sure: float, seed: int = 0) -> list[Conversation]:
    """After token t comes t + 1 of 50 with probability `sure`, else anything."""
    chance = random.Random(seed)
    said = []
    for _ in range(count):
        text = [chance.randrange(50)]
        while len(text) < 40:
            likely = (text[-1] + 1) % 50
            text.append(likely if chance.random() < sure else chance.randrange(50))
        said.append(Conversation(tuple(text[:5]), tuple(text[5:])))
    return said


def test_a_table_says_what_usually_followed() -> None:
    table = build_table(spoken(200, 0.8), 50, NgramOptions())
    assert [table.find([7, token])[0] for token in range(49)] == list(range(1, 50))


def test_what_is_left_out_says_nothing_new(monkeypatch: pytest.MonkeyPatch) -> None:
    said = spoken(100, 0.6)
    short = build_table(said, 50, NgramOptions(order=3, min_count=1))
    monkeypatch.setattr(building, "SAME_LEVELS", -1)
    full = build_table(said, 50, NgramOptions(order=3, min_count=1))
    assert short.entries < 0.95 * full.entries
    texts = [one.answer_ids[: 3 + number % 20] for number, one in enumerate(said)]
    for text in texts:
        (token, level), (full_token, full_level) = short.find(text), full.find(text)
        assert token == full_token
        assert abs(level - full_level) <= 12


def test_rare_long_contexts_are_left_out() -> None:
    said = spoken(100, 0.5)
    sizes = [build_table(said, 50, NgramOptions(min_count=least)).entries for least in (1, 2, 3)]
    assert sizes[0] > sizes[1] > sizes[2] > 50


@pytest.mark.parametrize("sure", [0.3, 0.8])
def test_tokens_stand_as_often_as_promised(sure: float) -> None:
    table = train_table(spoken(1000, sure), 50).table
    promised, stood = [], []
    for one in spoken(300, sure, seed=9):
        index = SuffixIndex()
        for place in range(1, 30):
            text = (*one.prompt_ids, *one.answer_ids[:place])
            (token,), (confidence,) = lookup_chain(table, text, index.longest(text, 1), 1)
            promised.append(confidence)
            stood.append(token == one.answer_ids[place])
    assert mean(promised) == pytest.approx(mean(stood), abs=0.05)
    assert mean(stood) > 0.9 * sure


def test_a_trial_tells_how_many_tokens_each_source_names() -> None:
    trial = train_table(spoken(500, 0.7), 50).trial
    assert trial.tokens == 50 * 34
    assert trial.table == pytest.approx(0.7, abs=0.05)
    assert max(trial.table, trial.match) <= trial.either <= trial.table + trial.match


def test_the_same_answers_give_the_same_table() -> None:
    first, second = (train_table(spoken(150, 0.6), 50).table for _ in range(2))
    for name in ("checks", "tokens", "levels"):
        assert (getattr(first, name) == getattr(second, name)).all()
    assert (first.evidence.rates == second.evidence.rates).all()


def test_too_few_answers_and_wrong_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="99 answers are too few"):
        train_table(spoken(99, 0.5), 50)
    with pytest.raises(ConfigError, match="--order must be in"):
        NgramOptions(order=9)
    with pytest.raises(ConfigError, match="--min-count must be >= 1, got 0"):
        NgramOptions(min_count=0)
