"""Engines of the comparison live in processes of their own, which may be other environments'."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

import pytest

from benchmarks.peers_parts.contract import Outcome, Stopwatch, Trial, Users
from benchmarks.peers_parts.worker import PeerFailedError, PeerProcess

TRIAL = Trial(prompts=((1, 2, 3), (4,)), max_tokens=2, users=2)


class Echo:
    """Answers a prompt with its last token."""

    def __init__(self, mood: str) -> None:
        if mood == "absent":
            raise ModuleNotFoundError("No module named 'engine'")
        self._mood = mood

    def run(self, trial: Trial) -> Outcome:
        if self._mood == "dies":
            sys.exit(3)
        tokens = tuple((prompt[-1],) * trial.max_tokens for prompt in trial.prompts)
        return Outcome(tokens, (0.5,) * len(tokens), (1.0,) * len(tokens), 1.0)


@pytest.mark.parametrize("python", [None, Path(sys.executable)])
def test_a_peer_answers_trials_one_after_the_other(python: Path | None) -> None:
    peer = PeerProcess(partial(Echo, "well"), 1, python)
    try:
        for _ in range(2):
            assert peer.run(TRIAL).tokens == ((3, 3), (4, 4))
        assert peer.resident_bytes > 0
    finally:
        peer.close()


def test_an_engine_that_is_missing_says_so() -> None:
    with pytest.raises(PeerFailedError, match="No module named 'engine'"):
        PeerProcess(partial(Echo, "absent"), 1)


def test_an_engine_that_dies_is_told_with_its_exit_code() -> None:
    peer = PeerProcess(partial(Echo, "dies"), 1)
    try:
        with pytest.raises(PeerFailedError, match="exit code 3"):
            peer.run(TRIAL)
    finally:
        peer.close()


def test_an_interpreter_that_cannot_run_it_is_an_engine_left_out() -> None:
    with pytest.raises(PeerFailedError, match="exit code 1"):
        PeerProcess(partial(Echo, "well"), 1, Path("/bin/false"))


def test_an_interpreter_that_is_not_there_is_an_engine_left_out(tmp_path: Path) -> None:
    with pytest.raises(PeerFailedError, match="nowhere"):
        PeerProcess(partial(Echo, "well"), 1, tmp_path / "nowhere")


def test_who_has_an_answer_asks_for_the_next_one() -> None:
    trial = Trial(prompts=((1,), (2,), (3,)), max_tokens=2, users=2)
    asked: list[int] = []
    users = Users(trial, asked.append)
    assert asked == [0, 1]
    users.next()
    assert asked == [0, 1, 2]
    users.next()
    assert asked == [0, 1, 2]
    assert [list(wave) for wave in trial.waves()] == [[0, 1], [2]]


def test_an_answer_is_timed_from_when_it_was_asked_for() -> None:
    watch = Stopwatch(Trial(prompts=((1,), (2,)), max_tokens=2, users=1), 10.0)
    for index, asked in enumerate((10.0, 12.0)):
        watch.ask(index, asked)
        watch.add(index, [7], asked + 0.5)
        watch.add(index, [8], asked + 2.0)
    outcome = watch.outcome()
    assert outcome.tokens == ((7, 8), (7, 8))
    assert outcome.first_token_seconds == (0.5, 0.5)
    assert outcome.answer_seconds == (2.0, 2.0)
    assert (outcome.tokens_per_second, outcome.tokens_per_second_per_user) == (1.0, 1.0)
