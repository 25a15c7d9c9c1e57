"""Plans of whole blocks, for what sends plans around them."""

from __future__ import annotations

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.engine.planning import FullPlanSource


class FullPlans(FullPlanSource):
    """`FullPlanSource` that keeps what it is told of times and prices."""

    def __init__(self) -> None:
        self.draft_price = 0.0
        self.adopted: list[RoundTimeModel] = []

    def adopt(self, round_time: RoundTimeModel) -> bool:
        self.adopted.append(round_time)
        return True
