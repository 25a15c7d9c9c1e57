"""Verifiers that share fewer and fewer drafters, with and without a price on the drafters' time.

Simulated with the cluster of `dspark simulate`, on a hypothetical machine where drafting pays: a target step
takes 20 ms up to 128 tokens, a draft pass 4 ms plus 0.1 ms per further request. Draft outcomes are those
recorded with the shipped drafter (docs/simulation.md).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.algorithms.step_surface import StepPoint
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.simulation.domains import DEFAULTS, read_domains, stack_domains
from dspark_core.simulation.running import World, simulate
from dspark_core.simulation.scenario import Scenario

PLANNERS = ("none", "algorithm1", "cluster:unpriced", "cluster")
MACHINE = RoundTimeModel(
    StepTimeModel(
        tuple(
            StepPoint(1, tokens, 0, seconds) for tokens, seconds in ((1, 0.020), (128, 0.020), (512, 0.060))
        )
    ),
    DraftTimeModel((1, 64), (0.004, 0.0103)),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--verifiers", type=int, default=16)
    parser.add_argument("--drafters", type=int, nargs="+", default=[16, 8, 4, 3, 2, 1])
    parser.add_argument("--users", type=int, default=8, help="users per verifier")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    world = World(stack_domains(read_domains(DEFAULTS)), MACHINE)
    print("tokens/s, drafters busy, mean wait behind other verifiers")
    print(f"{'drafters':>8} " + " ".join(f"{name:>19}" for name in PLANNERS))
    rows = []
    for drafters in arguments.drafters:
        found = {planner: _measure(world, arguments, drafters, planner) for planner in PLANNERS}
        print(f"{drafters:8d} " + " ".join(_cell(**one) for one in found.values()), flush=True)
        rows.append({"drafters": drafters, **found})
    if arguments.out is not None:
        settings = {name: value for name, value in vars(arguments).items() if name not in ("out", "drafters")}
        arguments.out.write_text(json.dumps({**settings, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def _cell(tokens_per_second: float, drafters_busy: float, queue_seconds: float) -> str:
    return f"{tokens_per_second:7.0f} {drafters_busy:4.0%} {1000 * queue_seconds:4.1f} ms"


def _measure(world: World, arguments: argparse.Namespace, drafters: int, planner: str) -> dict[str, float]:
    """Means over the seeds."""
    summaries = [
        simulate(
            world,
            Scenario(
                verifiers=arguments.verifiers,
                drafters=drafters,
                users=arguments.users * arguments.verifiers,
                requests=arguments.requests,
                no_lookup=True,
                seed=seed,
            ),
            planner,
        )
        for seed in range(arguments.seeds)
    ]
    return {
        "tokens_per_second": fmean(one.steady_tokens_per_second for one in summaries),
        "drafters_busy": fmean(one.drafter_utilisation for one in summaries),
        "queue_seconds": max(fmean(one.draft_queue_seconds for one in summaries), 0.0),
    }


if __name__ == "__main__":
    main()
