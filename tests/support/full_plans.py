"""A fake local planner of whole blocks, for tests of the code that wraps it."""

from __future__ import annotations

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.engine.rounds.planning import FullPlanSource


class FullPlans(FullPlanSource):
    """`FullPlanSource` that records the round times it adopts and the draft price."""

    def __init__(self) -> None:
        self.draft_price = 0.0
        self.adopted: list[RoundTimeModel] = []

    def adopt(self, round_time: RoundTimeModel) -> bool:
        self.adopted.append(round_time)
        return True
