"""Two cohorts that take turns against rounds of all requests, by load and by round trip to the drafter.

    python -m benchmarks.cohorts [--users 2 4 8 16] [--round-trip-ms 0 5 20] [--minutes 6]

The target runs in this process on one thread, the drafter in another process on another core, behind a relay
that delays traffic both ways. Closed loop: every finished answer starts the next prompt. Methods alternate in
slices on the same running requests. `fixed`: drafts for all requests and verifies a fixed number of tokens.
`scheduled`: drafts and verifies where it pays, without and with the choice of taking turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.cohorts_parts.far_drafter import FarDrafter
from benchmarks.environment import describe_arguments, describe_machine
from benchmarks.frontier_parts.planners import FixedLengthPlanSource
from benchmarks.frontier_parts.stack import LoadedLoop, Method, SliceResult
from dspark_core.algorithms.draft_policy import DraftCandidate
from dspark_core.algorithms.plan_request import PlanRequest
from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.engine.building import EngineOptions, build_target
from dspark_core.engine.drafts.draft_turns import DECISION_ROUNDS
from dspark_core.engine.protocols import PlanSource
from dspark_core.engine.rounds.planning import LocalPlanSource
from dspark_core.evaluation.prompt_sets import read_prompt_set
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.records import RoundReport
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER

PLAIN, FIXED, FIXED_TURNS = "plain", "fixed", "fixed, in turns"
SCHEDULED, CHOSEN = "scheduled", "scheduled, turns if faster"
OVERHEAD = 1.5
"""Ratio of total time to slice time: loading and unmeasured rounds."""


class Turns:
    """Wraps a planner to fix the number of cohorts; None lets it choose."""

    def __init__(self, inner: PlanSource, cohorts: int | None) -> None:
        self._inner = inner
        self._cohorts = cohorts

    def cohorts(self, candidates: Sequence[DraftCandidate], given: int | None) -> int:
        return self._inner.cohorts(candidates, self._cohorts if given is None else given)

    def wants_draft(self, candidates: Sequence[DraftCandidate]) -> tuple[bool, ...]:
        return self._inner.wants_draft(candidates)

    def plan(self, requests: Sequence[PlanRequest], capacity: int | None = None) -> tuple[int, ...]:
        return self._inner.plan(requests, capacity)

    def report(self, report: RoundReport) -> None:
        self._inner.report(report)


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(1)
    options = EngineOptions(
        target_model=DEFAULT_MODEL,
        drafter=arguments.drafter,
        dtype="bfloat16",
        kv_cache_bytes=arguments.kv_cache_mb * 2**20,
    )
    target = build_target(options)
    if target.geometry is None:
        raise AssertionError("a drafter is always named")
    environ = {"DSPARK_DRAFTER": arguments.drafter, "DSPARK_TORCH_THREADS": "1", "OMP_NUM_THREADS": "1"}
    far = FarDrafter(target.geometry, {**environ, "DSPARK_METRICS_PORT": "0"})
    tokenizer = load_tokenizer(resolve_model_path(DEFAULT_MODEL))
    rows = read_prompt_set(arguments.prompts).rows
    loop = LoadedLoop(
        target,
        options,
        [tokenizer.encode_chat(row.chat()) for row in rows],
        max_running=max(arguments.users),
        max_tokens=arguments.max_tokens,
        temperature=0.0,
        stop_token_ids=tokenizer.stop_token_ids,
        source=far.source,
        warm_up_rounds=DECISION_ROUNDS + 4,
    )
    loop.warm_prompts()
    slices = _measure(arguments, loop, far)
    far.close()
    _show(slices)
    _write(arguments, slices)


def _measure(
    arguments: argparse.Namespace, loop: LoadedLoop, far: FarDrafter
) -> dict[tuple[float, int], dict[str, list[SliceResult]]]:
    """Slices by (round trip, users) and method."""
    if loop.round_time is None:
        raise AssertionError("the loop is profiled")
    cells = len(arguments.round_trip_ms) * len(arguments.users) * arguments.repetitions
    seconds = 60.0 * arguments.minutes / OVERHEAD / (cells * 5)
    found: dict[tuple[float, int], dict[str, list[SliceResult]]] = {}
    for round_trip_ms in arguments.round_trip_ms:
        far.move(round_trip_ms / 1000)
        times = dataclasses.replace(loop.round_time, network_seconds=round_trip_ms / 1000)
        for users in arguments.users:
            methods = _methods(arguments.verify, times)
            cell = found.setdefault((round_trip_ms, users), {method.name: [] for method in methods})
            for turn in range(arguments.repetitions):
                for method in methods[turn % len(methods) :] + methods[: turn % len(methods)]:
                    cell[method.name].append(loop.run_slice(method, users, turn, seconds))
            print(f"round trip {round_trip_ms} ms, {users} users:", _line(cell), flush=True)
    return found


def _methods(verify: int, times: RoundTimeModel) -> list[Method]:
    return [
        Method(PLAIN, Turns(FixedLengthPlanSource(0), 1)),
        Method(FIXED, Turns(FixedLengthPlanSource(verify), 1)),
        Method(FIXED_TURNS, Turns(FixedLengthPlanSource(verify), 2)),
        Method(SCHEDULED, Turns(LocalPlanSource(times), 1)),
        Method(CHOSEN, Turns(LocalPlanSource(times), None)),
    ]


def _speed(slices: Sequence[SliceResult]) -> float:
    return statistics.median(one.tokens / one.seconds for one in slices)


def _line(cell: dict[str, list[SliceResult]]) -> str:
    return ", ".join(f"{name} {_speed(slices):.0f}" for name, slices in cell.items())


def _share(slices: Sequence[SliceResult]) -> float:
    return sum(one.turns for one in slices) / max(sum(one.rounds for one in slices), 1)


def _show(found: dict[tuple[float, int], dict[str, list[SliceResult]]]) -> None:
    table = Table("round trip, ms", "users", *next(iter(found.values())), "rounds in turns", title="tokens/s")
    for (round_trip_ms, users), cell in found.items():
        speeds = [f"{_speed(slices):.0f}" for slices in cell.values()]
        table.add_row(f"{round_trip_ms:g}", str(users), *speeds, f"{_share(cell[CHOSEN]):.0%}")
    Console().print(table)


def _write(
    arguments: argparse.Namespace, found: dict[tuple[float, int], dict[str, list[SliceResult]]]
) -> None:
    rows = [
        {
            "round_trip_ms": round_trip_ms,
            "users": users,
            "method": name,
            "tokens_per_second": _speed(slices),
            "rounds_in_turns": _share(slices),
            "slices": [dataclasses.asdict(one) for one in slices],
        }
        for (round_trip_ms, users), cell in found.items()
        for name, slices in cell.items()
    ]
    document = {
        "benchmark": "cohorts",
        "arguments": describe_arguments(arguments),
        "environment": describe_machine(),
        "rows": rows,
    }
    arguments.out.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(f"written to {arguments.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--users", type=int, nargs="+", default=[2, 4, 8, 16])
    parser.add_argument("--round-trip-ms", type=float, nargs="+", default=[0.0, 5.0, 20.0])
    parser.add_argument(
        "--verify",
        type=int,
        default=2,
        help="verified tokens per block where that is fixed (default: %(default)s)",
    )
    parser.add_argument("--repetitions", type=int, default=3, help="slices per method")
    parser.add_argument(
        "--minutes",
        type=float,
        default=6.0,
        help="approximate length of the whole run (default: %(default)s)",
    )
    parser.add_argument("--max-tokens", type=int, default=192, help="tokens per answer")
    parser.add_argument("--prompts", type=Path, default=Path("loadtest/prompts.jsonl"))
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER)
    parser.add_argument("--kv-cache-mb", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cohorts.json"))
    return parser


if __name__ == "__main__":
    main()
