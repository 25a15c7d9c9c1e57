"""Time to plan one round, by number of requests and kind of batch, from request records and from arrays.

    python -m benchmarks.planner [--out benchmarks/results/planner.json]

Survival is random (confidences uniform in 0.3 to 1), step times are jagged. Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import accumulate
from operator import mul
from pathlib import Path

from benchmarks.environment import describe_machine
from dspark_core.algorithms.draft_policy import DraftCandidate, DraftPolicy
from dspark_core.algorithms.plan_batch import PlanBatch
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.planner import capacity_of, plan_batch, plan_lengths
from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_surface import StepPoint
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.records import RequestSurvival

SIZES = (1, 16, 256, 1024)
BLOCK = 7
CONTEXT = 500


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    round_time = stepped_times()
    rows = {}
    for size in SIZES:
        for name, work in cases(size, round_time).items():
            rows[f"{size} x {BLOCK}, {name}"] = microseconds(work, arguments.repeats)
    print(f"{'':58} median us")
    for name, value in rows.items():
        print(f"{name:58} {value:9.0f}")
    if arguments.out is not None:
        document = {"benchmark": "planner", "environment": describe_machine(), "median_microseconds": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
        print(f"written to {arguments.out}")


def cases(size: int, round_time: RoundTimeModel) -> dict[str, Callable[[], object]]:
    requests = random_requests(size, coupled=False)
    free = random_requests(size, coupled=True)
    mixed = [b if index % 2 else a for index, (a, b) in enumerate(zip(requests, free, strict=True))]
    floored, all_floored = with_floors(requests, 1.0, every=8), with_floors(requests, 10.0, every=1)
    free_floored, free_held, free_tight = (with_floors(free, floor, every=1) for floor in (10.0, 5.0, 8.0))
    behind = with_floors(requests, 12.0, every=8)
    cheap = RoundTimeModel(StepTimeModel.of_curve((1, 8 * SIZES[-1]), (0.010, 0.020)))
    batch, free_batch = PlanBatch.of(requests), PlanBatch.of(free)
    capacity = capacity_of(requests, round_time)
    policy, candidates = drafted_policy(requests)
    return {
        "Algorithm 1, arrays": lambda: plan_batch(batch, round_time),
        "Algorithm 1, records": lambda: plan_lengths(requests, round_time),
        "Algorithm 1 in rounds where most tokens pay, records": lambda: plan_lengths(requests, cheap),
        "given capacity, arrays": lambda: plan_batch(batch, round_time, capacity=capacity),
        "free search (coupled), arrays": lambda: plan_batch(free_batch, round_time),
        "half coupled, records": lambda: plan_lengths(mixed, round_time),
        "one in eight with a floor, records": lambda: plan_lengths(floored, round_time),
        "one in eight behind its floor, records": lambda: plan_lengths(behind, round_time),
        "all with floors, records": lambda: plan_lengths(all_floored, round_time),
        "all with floors, given capacity, records": lambda: plan_lengths(
            all_floored, round_time, capacity=capacity
        ),
        "all coupled with floors, records": lambda: plan_lengths(free_floored, round_time),
        "all coupled with floors that hold, records": lambda: plan_lengths(free_held, round_time),
        "all coupled with floors that hold for a while, records": lambda: plan_lengths(
            free_tight, round_time
        ),
        "capacity of a round with floors on all, records": lambda: capacity_of(all_floored, round_time),
        "capacity of a round that is over, records": lambda: capacity_of(requests, round_time),
        "for whom to draft": lambda: policy.choose(candidates, round_time),
    }


def microseconds(work: Callable[[], object], repeats: int) -> float:
    work()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return 1e6 * statistics.median(times)


def random_requests(size: int, *, coupled: bool) -> list[PlanRequest]:
    source = random.Random(size)
    return [
        PlanRequest(
            sequence_id=str(index),
            survival=tuple(accumulate((source.uniform(0.3, 1.0) for _ in range(BLOCK)), mul)),
            context_tokens=CONTEXT,
            coupled=coupled,
        )
        for index in range(size)
    ]


def with_floors(requests: list[PlanRequest], floor: float, *, every: int) -> list[PlanRequest]:
    return [
        replace(r, floor_tokens_per_second=floor if i % every == 0 else None) for i, r in enumerate(requests)
    ]


def drafted_policy(requests: list[PlanRequest]) -> tuple[DraftPolicy, list[DraftCandidate]]:
    """A policy that has seen one round of every request."""
    policy = DraftPolicy()
    candidates = [DraftCandidate(sequence_id=r.sequence_id, context_tokens=CONTEXT) for r in requests]
    policy.choose(candidates, stepped_times())
    policy.learn(
        [
            RequestSurvival(
                sequence_id=r.sequence_id, survival=tuple(r.survival), verify_length=4, accepted=2
            )
            for r in requests
        ]
    )
    return policy, candidates


def stepped_times() -> RoundTimeModel:
    """A step that pads to multiples of 64 tokens, profiled at request counts up to 1,024."""
    points = [
        StepPoint(r, b, 128 * r, 0.010 + 0.0002 * 64 * -(-b // 64) + 0.00005 * r)
        for r in (1, 4, 16, 64, 256, 1024)
        for b in sorted({r, 2 * r, 4 * r, 8 * r, r + 1})
    ]
    return RoundTimeModel(StepTimeModel(tuple(points)), DraftTimeModel((1, 32, 1024), (0.004, 0.010, 0.1)))


if __name__ == "__main__":
    main()
