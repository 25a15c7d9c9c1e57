"""Within a tier the first to come is the first served, tiers take turns, and no hopeless request blocks."""

from dataclasses import dataclass, field

import pytest

from dspark_core.cluster.floor_queues import FloorQueues, Waiter
from dspark_core.errors import QueueFullError
from dspark_core.records import AssignRequest

OUT_OF_REACH = 99.0


@dataclass(eq=False)
class Place:
    """What a request waits for."""

    left: bool = False

    def done(self) -> bool:
        return self.left


@dataclass
class Hall:
    """`room`: how many more are admitted, by model."""

    room: dict[str, int]
    admitted: list[str] = field(default_factory=list)
    forgotten: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.queues: FloorQueues[Place] = FloorQueues(
            lambda request: request.min_tokens_per_second < OUT_OF_REACH,
            most_tiers=3,
            on_forgotten=self.forgotten.append,
        )

    def enter(self, name: str, tier: str, *, model: str = "m", floor: float = 1.0) -> Waiter[Place]:
        request = AssignRequest(request_id=name, model=model, tier=tier, min_tokens_per_second=floor)
        return self.queues.add(self.queues.open(request), request, Place())

    def pump(self) -> list[str]:
        """The tiers in the order of their turns."""
        return list(self.queues.admit(self._answer))

    def _answer(self, waiter: Waiter[Place]) -> bool:
        model = waiter.request.model
        if waiter.request.min_tokens_per_second >= OUT_OF_REACH or not self.room[model]:
            return False
        self.room[model] -= 1
        self.admitted.append(waiter.request.request_id)
        return True


def test_tiers_take_turns_and_the_one_admitted_last_is_tried_last():
    hall = Hall({"m": 3})
    for name, tier in (("a", "bulk"), ("b", "bulk"), ("c", "bulk"), ("x", "gold")):
        hall.enter(name, tier)
    assert hall.pump() == ["bulk", "gold", "bulk", "gold", "bulk"]
    assert hall.admitted == ["a", "x", "b"]
    hall.enter("y", "gold")
    hall.room["m"] = 1
    hall.pump()
    assert hall.admitted[3:] == ["y"]


def test_another_model_is_not_held_up_and_nobody_waits_behind_the_hopeless():
    hall = Hall({"m": 0, "n": 1})
    hall.enter("a", "bulk")
    hall.enter("b", "bulk", model="n")
    hall.pump()
    assert hall.admitted == ["b"]
    hall = Hall({"m": 1})
    hall.enter("hopeless", "bulk", floor=OUT_OF_REACH)
    hall.enter("a", "bulk")
    hall.pump()
    assert hall.admitted == ["a"]
    assert hall.queues.waiting("bulk") == 1


def test_whoever_left_is_passed_over():
    hall = Hall({"m": 1})
    hall.enter("gone", "bulk").answer.left = True
    hall.enter("a", "bulk")
    hall.pump()
    assert hall.admitted == ["a"]
    assert hall.queues.empty


def test_a_tier_that_nobody_waits_in_makes_room_and_may_be_left_after_that():
    hall = Hall({"m": 1})
    waiter = hall.enter("a", "one")
    hall.pump()  # answered, but it has yet to hear of it
    for tier in ("two", "three", "four"):
        hall.enter(tier, tier)
    assert hall.forgotten == ["one"]
    hall.queues.remove("one", waiter)
    assert hall.queues.waiting("one") == 0
    with pytest.raises(QueueFullError, match="requests of 3 tiers wait"):
        hall.enter("b", "one")
