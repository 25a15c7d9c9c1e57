"""Ways of speculating take turns on one loop and do not learn of each other."""

from __future__ import annotations

import torch

from benchmarks.frontier_parts.stack import SwitchedLookup
from dspark_core.algorithms.lookup_worth import KEPT_ROUNDS, TRIED_ROUNDS
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.records import RoundReport
from tests.unit.engine.tiny import prompts, request, tiny_engine


class Reports(FullPlanSource):
    def __init__(self) -> None:
        self.reports: list[RoundReport] = []

    def report(self, report: RoundReport) -> None:
        self.reports.append(report)


def test_rounds_of_a_method_that_does_not_look_up_say_nothing_of_looking_up() -> None:
    plans, lookup = Reports(), SwitchedLookup(None)
    loop = RoundLoop(
        tiny_engine(num_pages=256), plans, lookup=lookup, generator=torch.Generator().manual_seed(0)
    )
    for index, prompt in enumerate(prompts(3, seed=9, longest=12)):
        loop.submit(request(f"r{index}", prompt * 3, 250))
    for enabled, rounds in ((True, 6), (False, KEPT_ROUNDS + 10), (True, TRIED_ROUNDS)):
        lookup.enabled = enabled
        plans.reports.clear()
        for _ in range(rounds):
            loop.step()
        looked = [any(one.survival for one in report.requests) for report in plans.reports]
        assert len(looked) == rounds
        assert {len(report.requests) for report in plans.reports[3:]} == {3}
        # Had it been told of rounds that looked nothing up, it would try now what plain ones give.
        assert all(looked[3:]) if enabled else not any(looked)
