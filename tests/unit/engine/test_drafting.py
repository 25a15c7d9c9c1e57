"""How long rounds wait for a slow drafter, and how much it is sent at once. Uses only a manual clock."""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from dspark_core.engine.draft_engines.draft_context import DraftContext
from dspark_core.engine.drafts.drafting import (
    FEATURE_BYTES,
    FIRST_BACKOFF_SECONDS,
    MAX_BACKOFF_SECONDS,
    OUTAGE_SECONDS,
    PRIMED_POSITIONS,
    Drafting,
)
from dspark_core.engine.protocols import DraftBlock, DraftGeometry, DraftItem, DraftReply
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.sequence import SequenceState
from dspark_core.errors import DraftUnavailableError
from dspark_core.records import GenerateRequest, SamplingParams, SpeculationOptions, Verification
from services.common.limits import MAX_MESSAGE_BYTES
from tests.support.clock import ManualClock
from tests.unit.engine.tiny import (
    ScriptedDrafts,
    naive_greedy,
    prompts,
    request,
    run,
    tiny_decoder,
    tiny_engine,
)

BLOCK = 4
DEADLINE = 0.5
ROUND_SECONDS = 0.03
GREEDY = SamplingParams(temperature=0.0)
PLAIN, COUPLED = SpeculationOptions(), SpeculationOptions(verification=Verification.COUPLED)


class Awaited(Future[DraftReply]):
    """Waiting for it advances the clock."""

    def __init__(self, clock: ManualClock, ready_at: float, answer: Callable[[], None]) -> None:
        super().__init__()
        self._clock, self._ready_at, self._answer = clock, ready_at, answer

    def done(self) -> bool:
        if not super().done() and self._clock.now >= self._ready_at:
            self._answer()
        return super().done()

    def result(self, timeout: float | None = None) -> DraftReply:
        if not self.done() and timeout is not None:
            self._clock.now = min(self._clock.now + timeout, self._ready_at)
            if not self.done():
                raise TimeoutError
        return super().result()


class Drafter:
    """A `DraftSource` that keeps contexts like a real drafter, and answers in time or on demand."""

    apart = True
    connected = True

    def __init__(self, clock: ManualClock, *, window: int | None = None, feature_size: int = 8) -> None:
        self.geometry = DraftGeometry(
            fingerprint="f", block_size=BLOCK, feature_size=feature_size, vocab_size=9, context_window=window
        )
        self.generation = 1
        self.context = self._empty()
        self.late = False
        self.position_seconds = 0.0
        self.messages: list[list[DraftItem]] = []
        self._clock = clock
        self._owed: deque[tuple[Awaited, Sequence[DraftItem]]] = deque()

    def propose(self, items: Sequence[DraftItem]) -> Future[DraftReply]:
        self.messages.append(list(items))
        positions = sum(len(item.features) for item in items)
        ready_at = math.inf if self.late else self._clock.now + self.position_seconds * positions
        future = Awaited(self._clock, ready_at, self.answer)
        self._owed.append((future, items))
        return future

    def answer(self) -> None:
        """Sends all outstanding replies."""
        while self._owed:
            future, items = self._owed.popleft()
            future.set_result(DraftReply([self._block(item) for item in items]))

    def lose_state(self) -> None:
        self.generation += 1
        self.context = self._empty()
        while self._owed:
            self._owed.popleft()[0].set_exception(DraftUnavailableError("the drafter's stream ended"))

    def release(self, sequence_ids: Sequence[str]) -> None:
        for name in sequence_ids:
            self.context.forget(name)

    def _empty(self) -> DraftContext:
        return DraftContext(num_pages=20_000, page_tokens=16, window=self.geometry.context_window)

    def _block(self, item: DraftItem) -> DraftBlock:
        name, start, end = item.sequence_id, item.features_start, item.anchor_position
        assert len(item.features) == len(item.token_ids) == end - start
        if not self.context.reserve(name, start, end, in_use={name}):
            return DraftBlock(name, needs_context=True)
        return DraftBlock(name, (1,) * BLOCK, (0.9,) * BLOCK)


class Features:
    """The part of a target engine that `Drafting` uses."""

    def __init__(self, size: int, dtype: torch.dtype = torch.bfloat16) -> None:
        self._size, self._dtype = size, dtype
        self.reads = 0

    def read_features_of(self, spans: Sequence[tuple[Sequence[int], int, int]]) -> list[Tensor]:
        self.reads += 1
        return [torch.zeros((end - start, self._size), dtype=self._dtype) for _, start, end in spans]


class Rounds:
    """Plays rounds: drafts, a target pass, and one more token for every sequence."""

    def __init__(self, *lengths: int, window: int | None = None, feature_size: int = 8) -> None:
        self.clock = ManualClock()
        self.drafter = Drafter(self.clock, window=window, feature_size=feature_size)
        self.sequences = [sequence(f"s{number}", length) for number, length in enumerate(lengths)]
        self.waits: list[float] = []
        self.features = Features(feature_size)
        self.drafting = Drafting(
            self.drafter,
            self.features,  # type: ignore[arg-type]
            deadline_seconds=DEADLINE,
            clock=self.clock,
        )

    def one(self) -> set[str]:
        """Plays one round; returns which sequences got a draft."""
        drafts = self.drafting.propose(self.sequences)
        self.waits.append(drafts.seconds)
        self.clock.advance(ROUND_SECONDS)
        for one in self.sequences:
            one.tokens.append(1)
        return set(drafts.blocks)

    def run(self, seconds: float) -> int:
        """Plays rounds for some time; returns how many had to wait."""
        end, before = self.clock.now + seconds, len(self.waits)
        while self.clock.now < end:
            self.one()
        return sum(wait > 0.0 for wait in self.waits[before:])


def sequence(
    name: str, length: int, sampling: SamplingParams = GREEDY, speculation: SpeculationOptions = PLAIN
) -> SequenceState:
    asked = GenerateRequest(
        request_id=name, prompt_token_ids=(1,) * length, sampling=sampling, speculation=speculation
    )
    return SequenceState(request=asked, order=0, noise_seed=7, max_length=10**6)


def test_a_drafter_that_is_always_late_is_waited_for_ever_more_rarely() -> None:
    rounds = Rounds(50)
    rounds.drafter.late = True
    held_up = []
    for _ in range(40 * 60):
        if rounds.one() or rounds.waits[-1]:
            held_up.append(rounds.clock.now)
        rounds.drafter.answer()  # after the round: too late
    gaps = [later - earlier for earlier, later in pairwise(held_up)]
    expected = [FIRST_BACKOFF_SECONDS * 2**k for k in range(5)] + [MAX_BACKOFF_SECONDS]
    assert gaps[:6] == pytest.approx([one + DEADLINE for one in expected], abs=2 * ROUND_SECONDS)
    assert set(rounds.waits) == {0.0, DEADLINE}


def test_nothing_is_asked_for_while_a_reply_is_owed() -> None:
    rounds = Rounds(50)
    rounds.drafter.late = True
    assert rounds.run(30.0) == 1
    assert len(rounds.drafter.messages) == 1
    assert not rounds.drafting.available
    rounds.drafter.late = False
    rounds.drafter.answer()
    assert rounds.one() == {"s0"}
    assert rounds.drafting.available


def test_an_answer_in_time_ends_the_backoff() -> None:
    rounds = Rounds(50)
    for seconds in (20.0, 1.2):  # the second outage starts from the first backoff again
        rounds.drafter.late = True
        for _ in range(int(seconds / ROUND_SECONDS)):
            rounds.one()
            rounds.drafter.answer()
        rounds.drafter.late = False
        rounds.run(MAX_BACKOFF_SECONDS)
        assert rounds.one() == {"s0"}
    rounds.drafter.late = True
    assert rounds.one() == set()
    rounds.drafter.answer()
    rounds.drafter.late = False
    rounds.run(FIRST_BACKOFF_SECONDS)
    assert rounds.one() == {"s0"}


def test_a_lost_drafter_fails_at_once_and_costs_no_backoff() -> None:
    rounds = Rounds(50)
    rounds.drafter.late = True
    future = rounds.drafting.begin(rounds.sequences)
    assert future is not None
    rounds.drafter.lose_state()
    assert rounds.drafting.finish(future).seconds == 0.0
    rounds.drafter.late = False
    assert rounds.one() == {"s0"}


def test_nothing_is_read_for_a_drafter_that_is_not_there() -> None:
    """The outage may last long, and each round would read everything missed since it began."""
    rounds = Rounds(50)
    assert rounds.one() == {"s0"}
    rounds.drafter.lose_state()
    rounds.drafter.connected = False
    reads = rounds.features.reads
    rounds.run(1.0)
    assert rounds.features.reads == reads
    assert not rounds.drafting.available
    rounds.drafter.connected = True
    assert rounds.one() == {"s0"}
    assert rounds.drafting.available


def test_only_drafts_that_stay_away_are_worth_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    """A stream that reached its age is opened again within some rounds, every few minutes."""
    rounds = Rounds(50)
    caplog.set_level(logging.INFO)
    for seconds, told in (
        (0.9 * OUTAGE_SECONDS, []),
        (2.0 * OUTAGE_SECONDS, [logging.WARNING, logging.INFO]),
        (0.9 * OUTAGE_SECONDS, []),
    ):
        rounds.drafter.connected = False
        rounds.run(seconds)
        rounds.drafter.connected = True
        assert rounds.one() == {"s0"}
        assert [record.levelno for record in caplog.records] == told
        caplog.clear()


def test_what_came_late_is_not_sent_again() -> None:
    rounds = Rounds(300, 40)
    rounds.drafter.late = True
    assert rounds.one() == set()
    rounds.drafter.answer()
    rounds.drafter.late = False
    rounds.run(FIRST_BACKOFF_SECONDS)
    assert rounds.one() == {"s0", "s1"}
    assert [one.features_start for one in rounds.drafter.messages[1]] == [299, 39]


def test_what_came_late_is_sent_again_where_the_drafter_lost_it_since() -> None:
    rounds = Rounds(300)
    rounds.drafter.late = True
    rounds.one()
    rounds.drafter.answer()
    rounds.drafter.lose_state()
    rounds.drafter.late = False
    rounds.run(FIRST_BACKOFF_SECONDS)
    assert rounds.one() == {"s0"}
    assert rounds.drafter.messages[1][0].features_start == 0


def test_what_was_owed_when_the_stream_ended_is_sent_again() -> None:
    rounds = Rounds(300)
    rounds.drafter.late = True
    rounds.one()
    rounds.drafter.lose_state()
    rounds.drafter.late = False
    rounds.run(FIRST_BACKOFF_SECONDS)
    assert rounds.one() == {"s0"}
    assert rounds.drafter.messages[1][0].features_start == 0


def test_a_late_reply_that_asks_for_context_is_heard() -> None:
    rounds = Rounds(300)
    rounds.one()
    rounds.drafter.late = True
    rounds.one()
    rounds.drafter.release(["s0"])  # its memory ran out
    rounds.drafter.answer()
    rounds.drafter.late = False
    rounds.run(FIRST_BACKOFF_SECONDS)
    assert rounds.one() == {"s0"}
    assert [message[0].features_start for message in rounds.drafter.messages[1:3]] == [299, 0]


def test_a_late_reply_says_nothing_of_a_new_request_of_the_same_name() -> None:
    rounds = Rounds(300)
    rounds.drafter.late = True
    rounds.one()
    rounds.drafting.release(["s0"])
    rounds.sequences = [sequence("s0", 100)]
    rounds.drafter.answer()
    rounds.drafter.late = False
    rounds.run(FIRST_BACKOFF_SECONDS)
    assert rounds.one() == {"s0"}
    assert rounds.drafter.messages[1][0].features_start == 0


def test_two_flights_of_one_outage_hold_up_one_round_and_both_are_learned_from() -> None:
    rounds = Rounds(60, 70)
    rounds.drafter.late = True
    flights = [rounds.drafting.begin([one]) for one in rounds.sequences]
    waits = [rounds.drafting.finish(one).seconds for one in flights if one is not None]
    assert waits == pytest.approx([DEADLINE, 0.0])
    rounds.drafter.answer()
    rounds.drafter.late = False
    rounds.run(FIRST_BACKOFF_SECONDS)  # not twice as long
    assert rounds.one() == {"s0", "s1"}
    assert [one.features_start for one in rounds.drafter.messages[2]] == [59, 69]


def test_priming_goes_on_over_rounds_and_whoever_is_unfinished_gets_no_draft() -> None:
    rounds = Rounds(PRIMED_POSITIONS // 2, 2 * PRIMED_POSITIONS, 30)
    got = [rounds.one() for _ in range(4)]
    assert got == [{"s0"}, {"s0"}, {"s0", "s1", "s2"}, {"s0", "s1", "s2"}]
    for message in rounds.drafter.messages:
        assert sum(len(item.features) for item in message) <= PRIMED_POSITIONS + len(message)
    assert not any(one.drafter_generation < 0 for one in rounds.sequences)


def test_who_is_up_to_date_is_drafted_for_while_others_are_primed() -> None:
    rounds = Rounds(30)
    rounds.one()
    rounds.sequences.insert(0, sequence("long", 5 * PRIMED_POSITIONS))
    assert [rounds.one() for _ in range(5)] == [{"s0"}] * 5
    assert rounds.one() == {"s0", "long"}


@pytest.mark.parametrize("position_seconds", [0.0001, 0.0004, 0.002])  # in total: 0.8, 3.2 and 16 s
def test_priming_that_takes_longer_than_the_deadline_comes_to_an_end(position_seconds: float) -> None:
    rounds = Rounds(*[500] * 16)
    rounds.drafter.position_seconds = position_seconds
    rounds.run(60.0)
    assert [len(rounds.one()) for _ in range(20)] == [16] * 20
    assert max(rounds.waits[-20:]) < DEADLINE / 2
    assert sum(wait >= DEADLINE for wait in rounds.waits) <= 4


def test_a_drafter_that_was_slow_once_is_primed_as_fast_as_others_later() -> None:
    rounds = Rounds(30)
    rounds.one()
    rounds.drafter.position_seconds = 0.001
    rounds.sequences = [sequence("a", 3000)]
    rounds.run(10.0)
    rounds.drafter.position_seconds = 0.0
    rounds.sequences = [sequence("b", 20 * PRIMED_POSITIONS)]
    rounds.run(40 * ROUND_SECONDS)
    assert max(len(message[0].features) for message in rounds.drafter.messages[-40:]) == PRIMED_POSITIONS


def test_an_unfinished_item_ends_at_a_token_of_its_own_and_asks_for_the_cheapest_draft() -> None:
    rounds = Rounds()
    sampled = sequence("a", 3000, SamplingParams(temperature=1.0), COUPLED)
    sampled.tokens = [number % 7 for number in range(3000)]
    rounds.sequences = [sampled]
    rounds.one()
    rounds.one()
    (part,), (rest,) = rounds.drafter.messages
    assert part.anchor_position == PRIMED_POSITIONS
    assert part.anchor_token_id == PRIMED_POSITIONS % 7
    assert part.sampling.greedy
    assert part.most_tokens == 1
    assert part.verification is Verification.REJECTION
    assert (rest.features_start, rest.anchor_position) == (PRIMED_POSITIONS, 3000)
    assert rest.sampling.seed == 7


def test_a_fresh_window_goes_whole_or_waits() -> None:
    rounds = Rounds(*[5000] * 5, window=PRIMED_POSITIONS // 2 - 100)
    assert [len(rounds.one()) for _ in range(3)] == [2, 4, 5]
    assert {one.features_start for one in rounds.drafter.messages[0]} == {4999 - PRIMED_POSITIONS // 2 + 100}


def test_a_window_larger_than_a_rounds_priming_goes_alone() -> None:
    rounds = Rounds(9000, 9000, window=2 * PRIMED_POSITIONS)
    assert [rounds.one() for _ in range(2)] == [{"s0"}, {"s0", "s1"}]
    assert all(len(one.features) <= 2 * PRIMED_POSITIONS for one in rounds.drafter.messages[0])


@pytest.mark.parametrize("window", [None, 6000])  # a window that fits no message
def test_large_features_go_in_messages_of_bounded_size(window: int | None) -> None:
    size = 16384  # 32 KiB a position: 1,024 of them
    rounds = Rounds(2500, 900, 20, window=window, feature_size=size)
    got: set[str] = set()
    for _ in range(8):
        got = rounds.one()
        assert sum(one.features.nbytes for one in rounds.drafter.messages[-1]) <= FEATURE_BYTES
    assert got == {"s0", "s1", "s2"}


def test_even_usual_rounds_fit_a_message() -> None:
    rounds = Rounds(*[4] * 40)
    drafting = Drafting(
        rounds.drafter,
        Features(8),  # type: ignore[arg-type]
        deadline_seconds=DEADLINE,
        feature_bytes=100 * 8 * 2,
        clock=rounds.clock,
    )
    first, second = (len(drafting.propose(rounds.sequences).blocks) for _ in range(2))
    assert first == 50 // 3  # the features' dtype is not known yet
    assert second == 40  # now including those not sent before


@pytest.mark.parametrize("cohorts", [1, 2])
@pytest.mark.parametrize("window", [None, 3, 12])  # no round takes a whole window of 12
@pytest.mark.parametrize("pages", [64, 18])  # few: some are preempted
def test_tokens_are_the_targets_own_while_contexts_are_sent_in_parts(cohorts, window, pages) -> None:
    asked = [request(f"r{number}", prompt, 20) for number, prompt in enumerate(prompts(5, seed=11))]
    expected = {one.request_id: naive_greedy(tiny_decoder(), one.prompt_token_ids, 20) for one in asked}
    lengths = {one.request_id: len(one.prompt_token_ids) for one in asked}
    drafts = ScriptedDrafts(expected, prompt_lengths=lengths, error_rate=0.2, window=window, apart=True)
    engine = tiny_engine(num_pages=pages)
    parts = Drafting(drafts, engine, deadline_seconds=10.0, feature_bytes=8 * 6 * 4)
    loop = RoundLoop(engine, FullPlanSource(), drafting=parts, cohorts=cohorts)
    assert run(loop, asked) == expected
    assert max(len(item.features) for item in drafts.items) <= 8
    assert {item.sequence_id for item in drafts.items} == set(expected)


def test_a_rounds_features_leave_half_a_message_for_the_rest() -> None:
    assert 2 * FEATURE_BYTES <= MAX_MESSAGE_BYTES
