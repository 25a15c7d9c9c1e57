"""Cohorts in turns: the same tokens, no request left out, drafting while others are verified."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Sequence
from concurrent.futures import Future

import pytest
import torch
from torch import Tensor

from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.drafts.lookup import LookupDrafting
from dspark_core.engine.protocols import DraftItem, DraftReply
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource, LocalPlanSource
from dspark_core.engine.target.batch import Run
from dspark_core.records import RequestSurvival, RoundReport, SamplingParams
from tests.support.clock import ManualClock
from tests.unit.engine.tiny import (
    ScriptedDrafts,
    make_loop,
    naive_greedy,
    prompts,
    request,
    run,
    tiny_decoder,
    tiny_engine,
)

TOKENS = 20
SEEDED = SamplingParams(temperature=0.9, seed=5)


class Reports(FullPlanSource):
    def __init__(self) -> None:
        self.reports: list[RoundReport] = []

    def report(self, report: RoundReport) -> None:
        self.reports.append(report)


class Wavering(FullPlanSource):
    """Switches turns on and off at every decision."""

    def __init__(self) -> None:
        self._answers = itertools.cycle((2, 1))

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        return next(self._answers) if given is None else given


@pytest.fixture(scope="module")
def expected() -> dict[str, list[int]]:
    decoder = tiny_decoder()
    return {f"r{i}": naive_greedy(decoder, prompt, TOKENS) for i, prompt in enumerate(PROMPTS)}


PROMPTS = prompts(7, seed=11)
ASKED = [request(f"r{i}", prompt, TOKENS) for i, prompt in enumerate(PROMPTS)]
LENGTHS = {f"r{i}": len(prompt) for i, prompt in enumerate(PROMPTS)}


def drafts_of(expected: dict[str, list[int]], **options: object) -> ScriptedDrafts:
    return ScriptedDrafts(expected, prompt_lengths=LENGTHS, apart=True, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("planner", [FullPlanSource, Wavering])
@pytest.mark.parametrize("error_rate", [0.0, 0.4])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("pages", [64, 18])
def test_greedy_tokens_are_the_targets_own(expected, planner, error_rate, window, pages) -> None:
    drafts = drafts_of(expected, error_rate=error_rate, window=window)
    cohorts = None if planner is Wavering else 2
    loop = make_loop(tiny_engine(num_pages=pages), drafts, planner(), cohorts=cohorts)
    assert run(loop, ASKED) == expected
    assert (loop.batcher.preemptions > 0) == (pages == 18)
    assert loop.free_kv_fraction == 1.0


@pytest.mark.parametrize("pages", [64, 18])
def test_seeded_tokens_do_not_depend_on_turns(pages: int) -> None:
    asked = [request(f"r{i}", prompt, TOKENS, sampling=SEEDED) for i, prompt in enumerate(PROMPTS)]
    alone: dict[str, list[int]] = {}
    for one in asked:
        alone |= run(make_loop(), [one])
    assert run(make_loop(tiny_engine(num_pages=pages), drafts_of(alone), cohorts=2), asked) == alone


def test_looked_up_drafts_take_turns_too(expected) -> None:
    engine = tiny_engine()
    loop = RoundLoop(
        engine,
        FullPlanSource(),
        drafting=make_loop(engine, drafts_of(expected))._drafting,
        lookup=LookupDrafting(),
        cohorts=2,
        generator=torch.Generator().manual_seed(0),
    )
    asked = [request(f"r{i}", (*prompt, *prompt), TOKENS) for i, prompt in enumerate(PROMPTS)]
    decoder = tiny_decoder()
    assert run(loop, asked) == {
        one.request_id: naive_greedy(decoder, one.prompt_token_ids, TOKENS) for one in asked
    }


def test_cohorts_are_of_one_size_and_nobody_waits_for_more_than_a_turn(expected) -> None:
    plans = Reports()
    loop = make_loop(drafts=drafts_of(expected), planner=plans, cohorts=2)
    for one in ASKED:
        loop.submit(one)
    waits, uneven = dict.fromkeys(LENGTHS, 0), []
    while loop.has_work:
        decoding = {s.sequence_id for s in loop.batcher.running if s.decoding}
        loop.step()
        took = {told.sequence_id for told in plans.reports[-1].requests}
        assert took <= decoding
        if len(decoding) > 1:
            assert plans.reports[-1].cohorts == 2
            uneven.append(abs(len(decoding) - 2 * len(took)))
        for name in decoding:
            waits[name] = 0 if name in took else waits[name] + 1
            assert waits[name] <= 2  # two only if moved when others ended
    assert uneven[0] <= 1
    assert sum(one > 1 for one in uneven) <= 2  # for one round after several end at once


def test_drafts_are_made_while_the_other_cohort_is_verified(expected) -> None:
    """A drafter that takes 20 ms costs nothing if passes take longer."""
    drafts, clock = drafts_of(expected, error_rate=0.5), ManualClock()
    inner = drafts._block
    drafts._block = lambda item: (clock.advance(0.02 / len(ASKED)), inner(item))[1]  # type: ignore[method-assign]
    engine, plans = tiny_engine(), Reports()
    forward = engine.forward

    def long_pass(runs: Sequence[Run]) -> Tensor:
        """Ends when all is drafted that was asked for before."""
        assert drafts._worker is not None
        drafts._worker.submit(lambda: None).result(30)
        return forward(runs)

    engine.forward = long_pass  # type: ignore[method-assign]
    run(make_loop(engine, drafts, plans, clock, cohorts=2), ASKED)
    turns = [one for one in plans.reports if len(one.requests) > 1][2:]
    assert len(turns) > 4
    assert sum(one.hidden_draft_seconds for one in turns) > 0.8 * sum(one.draft_seconds for one in turns) > 0


class Gated(ScriptedDrafts):
    """Withholds its answers until the gate opens."""

    def __init__(self) -> None:
        super().__init__(apart=True)
        self.gate = threading.Event()

    def propose(self, items: Sequence[DraftItem]) -> Future[DraftReply]:
        gate, inner = self.gate, super()._block
        assert self._worker is not None
        return self._worker.submit(lambda: DraftReply([(gate.wait(10), inner(item))[1] for item in items]))


def test_who_leaves_while_drafted_for_leaves_nothing_behind(expected) -> None:
    drafts = Gated()
    drafts.gate.set()
    loop = make_loop(drafts=drafts, cohorts=2)
    for one in ASKED:
        loop.submit(one)
    for _ in range(3):
        loop.step()
    drafts.gate.clear()
    loop.step()  # requests drafts that do not arrive
    for one in ASKED:
        loop.cancel(one.request_id)
    assert not loop.has_work
    assert loop.free_kv_fraction == 1.0
    assert loop._turns._asked == []
    drafts.gate.set()
    assert run(loop, ASKED) == expected  # later requests with the same ids are served


def test_what_was_drafted_for_one_is_not_for_another_of_its_name(expected) -> None:
    """The first was greedy, so its drafts come without a distribution, which the second needs."""
    drafts = Gated()
    drafts.gate.set()
    loop = make_loop(drafts=drafts, cohorts=2)
    for one in ASKED:
        loop.submit(one)
    for _ in range(4):
        loop.step()
    for one in ASKED[:4]:
        loop.cancel(one.request_id)
        loop.submit(dataclasses.replace(one, sampling=SamplingParams(temperature=1.0)))
    tokens: dict[str, int] = dict.fromkeys(LENGTHS, 0)
    while loop.has_work:
        for output in loop.step():
            tokens[output.request_id] += len(output.chunk.token_ids)
    assert all(tokens[one.request_id] == TOKENS for one in ASKED[:4])


class Asked(ScriptedDrafts):
    """Records the position each sequence was last drafted for, and counts repeated positions."""

    def __init__(self, expected: dict[str, list[int]], **options: object) -> None:
        super().__init__(expected, prompt_lengths=LENGTHS, apart=True, **options)  # type: ignore[arg-type]
        self.anchors: dict[str, int] = {}
        self.twice = 0

    def propose(self, items: Sequence[DraftItem]) -> Future[DraftReply]:
        for item in items:
            self.twice += self.anchors.get(item.sequence_id) == item.anchor_position
            self.anchors[item.sequence_id] = item.anchor_position
        return super().propose(items)


@pytest.mark.parametrize("pages", [64, 18])
def test_nobody_is_drafted_for_twice_and_what_is_verified_was_drafted_there(expected, pages) -> None:
    drafts = Asked(expected, error_rate=0.4)
    loop = make_loop(tiny_engine(num_pages=pages), drafts, cohorts=2)
    plan, wrong = loop._plan, []

    def checked(decoding, there):  # type: ignore[no-untyped-def]
        used = [one for one in decoding if one.sequence_id in there.blocks]
        wrong.extend(drafts.anchors[one.sequence_id] != len(one.tokens) - 1 for one in used)
        return plan(decoding, there)

    loop._plan = checked  # type: ignore[method-assign]
    assert run(loop, ASKED) == expected
    assert len(wrong) > 20
    assert not any(wrong)
    assert drafts.twice == 0 or pages == 18  # after a preemption its position may repeat


def test_rounds_are_of_everybody_while_the_drafter_is_lost(expected) -> None:
    drafts, plans = drafts_of(expected), Reports()
    loop = make_loop(drafts=drafts, planner=plans, cohorts=2)
    for one in ASKED:
        loop.submit(one)
    for number in range(12):
        drafts.fail = 3 <= number < 8
        loop.step()
    cohorts = [one.cohorts for one in plans.reports]
    assert cohorts[1:3] == [2, 2]
    assert cohorts[6:8] == [1, 1]  # earlier drafts arrived, those requested meanwhile did not
    assert 2 in cohorts[9:]


class Undrafting(FullPlanSource):
    """Prefers turns but drafts for nobody."""

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        return given or 2

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        return (False,) * len(candidates)


def test_turns_with_nothing_to_hide_are_left_for_long(expected) -> None:
    loop = make_loop(drafts=drafts_of(expected), planner=Undrafting())
    for one in ASKED:
        loop.submit(dataclasses.replace(one, max_tokens=150))
    seen = []
    for _ in range(120):
        loop.step()
        seen.append(loop._turns.cohorts)
    assert 2 in seen[:20]
    assert set(seen[40:]) == {1}


def test_a_drafter_that_fails_between_asking_and_answering_costs_no_token(expected) -> None:
    drafts = drafts_of(expected)
    loop = make_loop(drafts=drafts, cohorts=2)
    for one in ASKED:
        loop.submit(one)
    tokens: dict[str, list[int]] = {one.request_id: [] for one in ASKED}
    for number in itertools.count():
        drafts.fail = number % 5 in (2, 3)
        if number % 7 == 6:
            drafts.lose_state()
        for output in loop.step():
            tokens[output.request_id].extend(output.chunk.token_ids)
        if not loop.has_work:
            break
    assert tokens == expected


ARITHMETIC = RoundTimeModel(
    StepTimeModel.of_curve((1, 8, 24, 48), (0.004, 0.008, 0.011, 0.022)), DraftTimeModel((1,), (0.008,))
)
WEIGHTS = RoundTimeModel(
    StepTimeModel.of_curve((1, 100), (0.050, 0.051)), DraftTimeModel((1,), (0.001,)), network_seconds=0.001
)


@pytest.mark.parametrize(("times", "cohorts"), [(ARITHMETIC, 2), (WEIGHTS, 1)])
def test_the_planner_takes_turns_where_they_are_faster(times: RoundTimeModel, cohorts: int) -> None:
    planner = LocalPlanSource(times)
    candidates = [DraftCandidate(sequence_id=str(i)) for i in range(16)]
    assert planner.cohorts(candidates, None) == 1  # not before anything is known
    planner.wants_draft(candidates)
    told = [
        RequestSurvival(sequence_id=str(i), survival=(0.95, 0.9), verify_length=2, accepted=2)
        for i in range(16)
    ]
    planner.report(RoundReport(replica_id="v", round=1, requests=tuple(told)))
    assert planner.cohorts(candidates, None) == cohorts
    assert planner.cohorts(candidates, 1) == 1
    assert planner.cohorts(candidates, 2) == 2
    assert LocalPlanSource(None).cohorts(candidates, None) == 1


def test_a_drafter_that_computes_in_place_of_the_target_is_not_drafted_ahead_with(expected) -> None:
    plans = Reports()
    drafts = ScriptedDrafts(expected, prompt_lengths=LENGTHS)
    run(make_loop(drafts=drafts, planner=plans, cohorts=2), ASKED)
    assert {one.cohorts for one in plans.reports} == {1}
