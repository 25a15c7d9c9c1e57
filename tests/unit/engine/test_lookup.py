"""Drafts from a request's own text: the tokens remain the target's, and bad drafts are soon not verified."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from scipy.stats import chisquare

from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.lookup_worth import KEPT_ROUNDS, TRIED_ROUNDS
from dspark_core.algorithms.ngram_table import NgramTable
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.drafts.lookup import BLOCK_TOKENS, LOOK_ROUNDS, UNUSED_ROUNDS, LookupDrafting
from dspark_core.engine.protocols import PlanSource
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource, LocalPlanSource
from dspark_core.records import DraftOrigin, RoundReport, SamplingParams, SpeculationOptions, Verification
from dspark_core.training.data.conversations import Conversation
from dspark_core.training.ngrams.building import NgramOptions, build_table
from tests.support.clock import ManualClock
from tests.unit.engine.tiny import (
    VOCAB,
    ScriptedDrafts,
    naive_greedy,
    naive_logits,
    prompts,
    request,
    run,
    tiny_decoder,
    tiny_engine,
)

FLAT = RoundTimeModel(
    StepTimeModel.of_curve((1, 64), (0.010, 0.0102)), DraftTimeModel((1, 8), (0.004, 0.005))
)
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.9, seed=77)


class Reports(FullPlanSource):
    """Verifies everything and records reports."""

    def __init__(self) -> None:
        self.reports: list[RoundReport] = []

    def report(self, report: RoundReport) -> None:
        self.reports.append(report)


def loop_of(
    planner: PlanSource | None = None,
    drafts: ScriptedDrafts | None = None,
    table: NgramTable | None = None,
    **more: Any,
) -> RoundLoop:
    engine = tiny_engine(num_pages=256)
    return RoundLoop(
        engine,
        planner or FullPlanSource(),
        drafting=Drafting(drafts, engine, deadline_seconds=30.0) if drafts else None,
        lookup=LookupDrafting(table),
        generator=torch.Generator().manual_seed(0),
        **more,
    )


def table_of_target(asked: dict[str, list[int]]) -> NgramTable:
    """A table built from greedy and sampled answers of the tiny target."""
    answers = [
        run(loop_of(), [request(n, p, 40, sampling=sampling) for n, p in asked.items()])
        for sampling in (GREEDY, SamplingParams(temperature=0.7, seed=3))
    ]
    said = [Conversation(tuple(asked[name]), tuple(ids)) for some in answers for name, ids in some.items()]
    return build_table(said, VOCAB, NgramOptions(order=3, min_count=1))


@pytest.fixture(scope="module", params=["text", "table"])
def table(request: pytest.FixtureRequest) -> NgramTable | None:
    return table_of_target(repetitive()) if request.param == "table" else None


def repetitive(count: int = 6) -> dict[str, list[int]]:
    return {f"r{i}": prompt * 3 for i, prompt in enumerate(prompts(count, seed=9, longest=12))}


@pytest.mark.parametrize(
    "planner", [FullPlanSource, lambda: LocalPlanSource(FLAT), lambda: LocalPlanSource(None)]
)
@pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
@pytest.mark.parametrize("drafted", [False, True])
def test_tokens_are_those_without_speculation(planner, sampling, drafted, table) -> None:
    given = repetitive()
    off = SpeculationOptions(enabled=False)
    plain = run(loop_of(), [request(n, p, 40, sampling=sampling, speculation=off) for n, p in given.items()])
    drafts = ScriptedDrafts(plain, prompt_lengths={n: len(p) for n, p in given.items()}) if drafted else None
    asked = [request(n, p, 40, sampling=sampling) for n, p in given.items()]
    looked = run(loop_of(planner(), drafts, table), asked)
    assert looked == plain
    if sampling is GREEDY:
        assert plain == {name: naive_greedy(tiny_decoder(), prompt, 40) for name, prompt in given.items()}


class Refusing(Reports):
    """Verifies nothing while `refuses` is set."""

    refuses = True

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        return (0,) * len(requests) if self.refuses else super().plan(requests, capacity)


def test_what_is_never_verified_is_looked_up_rarely_until_it_is() -> None:
    planner = Refusing()
    loop = loop_of(planner)
    name, prompt = next(iter(repetitive().items()))  # a lone request: for several, round times matter as well
    loop.submit(request(name, prompt, 200))
    for _ in range(80):
        loop.step()
    looked = [any(r.survival for r in report.requests) for report in planner.reports]
    assert sum(looked[:16]) >= UNUSED_ROUNDS
    assert 0 < sum(looked[-6 * LOOK_ROUNDS :]) <= 6
    planner.refuses = False
    for _ in range(2 * LOOK_ROUNDS):
        loop.step()
    assert all(any(r.survival for r in report.requests) for report in planner.reports[-4:])


class Costly(Reports):
    """Rounds of several requests take `times` as long if anything is looked up."""

    def __init__(self, clock: ManualClock, times: float) -> None:
        super().__init__()
        self._clock, self._times = clock, times

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        self._clock.advance(self._times if any(one.survival for one in requests) else 1.0)
        return super().plan(requests, capacity)


@pytest.mark.parametrize(("times", "pays"), [(100.0, False), (1.0, True)])
def test_batches_are_looked_up_for_while_their_rounds_gain_by_it(times: float, pays: bool) -> None:
    clock = ManualClock()
    planner = Costly(clock, times)
    loop = loop_of(planner, clock=clock)
    for turn in range(8):
        run(loop, [request(f"{turn}-{n}", p, 200) for n, p in repetitive(3).items()])
    looked = [any(r.survival for r in one.requests) for one in planner.reports if len(one.requests) == 3]
    assert len(looked) > KEPT_ROUNDS + TRIED_ROUNDS
    late = looked[KEPT_ROUNDS + TRIED_ROUNDS :]
    assert late.count(pays) > 0.8 * len(late)


def test_a_target_that_repeats_itself_is_decoded_in_fewer_rounds() -> None:
    loop = loop_of()
    loop.submit(request("r", prompts(1)[0], 160))
    chunks = []
    while loop.has_work:
        chunks += [output.chunk for output in loop.step()]
    stats = chunks[-1].stats
    assert stats is not None
    assert stats.committed_tokens == 159
    assert stats.accepted_length > 2.0  # greedy decoding of tiny models loops
    assert stats.lookup_accepted_tokens == stats.accepted_tokens > 80


def test_a_table_drafts_where_nothing_repeats() -> None:
    asked = {f"r{i}": prompt for i, prompt in enumerate(prompts(4, seed=5, longest=12))}
    rounds = {}
    for table in (None, table_of_target(asked)):
        loop = loop_of(table=table)
        for name, prompt in asked.items():
            loop.submit(request(name, prompt, 20))
        chunks = []
        while loop.has_work:
            chunks.append(loop.step())
        rounds[table is not None] = len(chunks)
    assert rounds[True] < 0.75 * rounds[False]


def test_unseeded_sampling_keeps_the_targets_law(table) -> None:
    """Tests the second token of the answer, which follows a looked-up draft in every run."""
    prompt, runs = [3, 5, 3, 5, 3], 2500
    decoder = tiny_decoder()
    sampling = SamplingParams(temperature=1.0)
    loop = loop_of(table=table)
    asked = [request(f"r{i}", prompt, 3, sampling=sampling) for i in range(runs)]
    tokens: list[list[int]] = []
    for start in range(0, runs, 16):
        tokens += run(loop, asked[start : start + 16]).values()
    first = torch.softmax(naive_logits(decoder, prompt)[-1].double(), -1)
    law = torch.zeros(VOCAB, dtype=torch.float64)
    for token, chance in enumerate(first.tolist()):
        law += chance * torch.softmax(naive_logits(decoder, [*prompt, token])[-1].double(), -1)
    seen = torch.bincount(torch.tensor([one[1] for one in tokens]), minlength=VOCAB)
    assert chisquare(seen.numpy(), (law / law.sum() * runs).numpy()).pvalue > 1e-3


def test_a_sampled_draft_states_its_law_as_point_masses() -> None:
    reports = Reports()
    loop = loop_of(reports)
    options = SpeculationOptions(verification=Verification.REJECTION)
    sampling = SamplingParams(temperature=0.7)
    run(loop, [request("r", [3, 5, 3, 5, 3], 12, sampling=sampling, speculation=options)])
    told = [one for report in reports.reports for one in report.requests if one.survival]
    assert told
    assert all(one.origin is DraftOrigin.LOOKUP and not one.drafted for one in told)


@pytest.mark.parametrize("options", [SpeculationOptions(lookup=False), SpeculationOptions(enabled=False)])
def test_a_request_may_do_without(options) -> None:
    reports = Reports()
    run(loop_of(reports), [request("r", [1, 2] * 8, 20, speculation=options)])
    assert not any(one.survival for report in reports.reports for one in report.requests)


def test_blocks_respect_what_is_asked_and_left() -> None:
    reports = Reports()
    asked = [
        request("short", [1, 2] * 8, 6),
        request("bounded", [1, 2] * 8, 40, speculation=SpeculationOptions(max_draft_tokens=2)),
        request("free", [1, 2] * 8, 40),
    ]
    run(loop_of(reports), asked)
    longest = dict.fromkeys(("short", "bounded", "free"), 0)
    for report in reports.reports:
        for one in report.requests:
            longest[one.sequence_id] = max(longest[one.sequence_id], len(one.survival))
    assert 0 < longest.pop("short") <= 4
    assert longest["bounded"] == 2 < longest["free"] <= BLOCK_TOKENS


def candidate(name: str, *lookup: float) -> DraftCandidate:
    return DraftCandidate(sequence_id=name, lookup_survival=lookup)


def test_a_likely_lookup_spares_the_drafter_and_an_unlikely_one_does_not() -> None:
    planner = LocalPlanSource(FLAT)
    likely = tuple(0.95**k for k in range(1, 16))
    assert planner.wants_draft([candidate("a", *likely), candidate("b"), candidate("c", 0.02)]) == (
        False,
        True,
        True,
    )


def test_losing_the_drafter_leaves_looked_up_drafts() -> None:
    given = repetitive(3)
    expected = {name: naive_greedy(tiny_decoder(), prompt, 60) for name, prompt in given.items()}
    drafts = ScriptedDrafts(expected, prompt_lengths={n: len(p) for n, p in given.items()})
    drafts.fail = True
    loop = loop_of(LocalPlanSource(FLAT), drafts)
    accepted = 0
    for name, prompt in given.items():
        loop.submit(request(name, prompt, 60))
    tokens: dict[str, list[int]] = {name: [] for name in given}
    while loop.has_work:
        for output in loop.step():
            tokens[output.request_id] += output.chunk.token_ids
            if output.chunk.finish_reason is not None:
                accepted += output.chunk.stats.lookup_accepted_tokens
    assert tokens == expected
    assert accepted > 0


def test_ended_requests_leave_nothing_behind() -> None:
    lookup = LookupDrafting()
    engine = tiny_engine()
    loop = RoundLoop(engine, FullPlanSource(), lookup=lookup)
    run(loop, [dataclasses.replace(request("r", [1, 2] * 6, 8))])
    loop.submit(request("cancelled", [1, 2] * 6, 50))
    loop.step()
    loop.step()
    loop.cancel("cancelled")
    assert not lookup.remembered
