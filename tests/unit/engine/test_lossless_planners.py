"""Tokens do not depend on the planner: every planner compared to naive decoding in float32."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

import pytest

from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.protocols import PlanSource
from dspark_core.engine.rounds.planning import FullPlanSource, LocalPlanSource
from dspark_core.records import RoundReport, SamplingParams, SpeculationOptions, Verification
from tests.unit.engine.tiny import (
    ScriptedDrafts,
    make_loop,
    naive_greedy,
    prompts,
    request,
    run,
    tiny_decoder,
)

STAIRS = RoundTimeModel(
    StepTimeModel.of_curve((1, 8, 9, 16, 17, 32), (0.010, 0.011, 0.018, 0.019, 0.027, 0.030)),
    DraftTimeModel((1, 8), (0.002, 0.004)),
)
STEEP = RoundTimeModel(StepTimeModel.of_curve((1, 32), (0.001, 1.0)), DraftTimeModel((1,), (0.5,)))


class Delayed(LocalPlanSource):
    """Plans with capacities as a scheduler would send them."""

    def __init__(self) -> None:
        super().__init__(STAIRS)
        self._capacities = itertools.cycle((0, 3, 11, 1, 40))

    def plan(self, asked: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        return super().plan(asked, next(self._capacities))


class Priced(LocalPlanSource):
    """Draft prices that vary with what was accepted, as a scheduler's would."""

    def __init__(self) -> None:
        super().__init__(STAIRS)
        self._prices = itertools.cycle((0.0, 150.0, 40.0, 1e6))

    def report(self, report: RoundReport) -> None:
        super().report(report)
        accepted = sum(request.accepted for request in report.requests)
        self.draft_price = next(self._prices) * (1 + accepted % 3)


PLANNERS: dict[str, Callable[[], PlanSource]] = {
    "everything": FullPlanSource,
    "early stopping": lambda: LocalPlanSource(STAIRS),
    "delayed": Delayed,
    "drafting at a price": Priced,
    "drafting dropped": lambda: LocalPlanSource(STEEP),
    "not profiled": lambda: LocalPlanSource(None),
}
GREEDY = SamplingParams(temperature=0.0)
SEEDED = SamplingParams(temperature=0.9, seed=77)


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, list[int]]]:
    """Prompts and their continuations without speculation, the greedy ones by the naive decoder."""
    given = {f"r{i}": prompt for i, prompt in enumerate(prompts(6, seed=5))}
    decoder = tiny_decoder()
    off = SpeculationOptions(enabled=False)
    seeded = [request(name, prompt, 16, sampling=SEEDED, speculation=off) for name, prompt in given.items()]
    return {
        "prompts": given,
        "greedy": {name: naive_greedy(decoder, prompt, 16) for name, prompt in given.items()},
        "seeded": run(make_loop(), seeded),
    }


@pytest.mark.parametrize("floor", [None, 120.0])
@pytest.mark.parametrize("planner", PLANNERS)
def test_no_planner_changes_tokens(plain, planner, floor) -> None:
    """Greedy and seeded requests in one batch, with drafts that are often wrong."""
    known = {f"g{n}": t for n, t in plain["greedy"].items()} | {
        f"s{n}": t for n, t in plain["seeded"].items()
    }
    asked = []
    for name, prompt in plain["prompts"].items():
        for mark, sampling in (("g", GREEDY), ("s", SEEDED)):
            one = request(f"{mark}{name}", prompt, 16, sampling=sampling)
            asked.append(dataclasses.replace(one, min_tokens_per_second=floor))
    lengths = {one.request_id: len(one.prompt_token_ids) for one in asked}
    drafts = ScriptedDrafts(known, prompt_lengths=lengths, error_rate=0.3)
    assert run(make_loop(drafts=drafts, planner=PLANNERS[planner]()), asked) == known


@pytest.mark.parametrize("planner", PLANNERS)
def test_rejection_sampled_requests_beside_them_change_nothing(plain, planner) -> None:
    sampled = [
        request(
            f"x{i}",
            prompt,
            16,
            sampling=SamplingParams(temperature=1.0),
            speculation=SpeculationOptions(verification=Verification.REJECTION),
        )
        for i, prompt in enumerate(prompts(3, seed=9))
    ]
    greedy = [request(name, prompt, 16) for name, prompt in plain["prompts"].items()]
    lengths = {one.request_id: len(one.prompt_token_ids) for one in greedy}
    drafts = ScriptedDrafts(plain["greedy"], prompt_lengths=lengths)
    tokens = run(make_loop(drafts=drafts, planner=PLANNERS[planner]()), [*sampled, *greedy])
    assert {name: tokens[name] for name in plain["greedy"]} == plain["greedy"]
    assert all(len(tokens[one.request_id]) == 16 for one in sampled)


def test_paused_requests_are_not_drafted_for(plain) -> None:
    name, prompt = next(iter(plain["prompts"].items()))
    drafts = ScriptedDrafts(error_rate=1.0)
    planner = LocalPlanSource(STEEP)
    tokens = run(make_loop(drafts=drafts, planner=planner), [request(name, prompt, 60)])
    assert tokens[name][:16] == plain["greedy"][name]
    assert len(drafts.items) < 15
