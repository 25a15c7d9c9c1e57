"""Simulated against measured throughput on this machine, by load and planner.

    python -m benchmarks.record_domains prompts=loadtest/prompts.jsonl --limit 20 --out /tmp/domains.json
    python -m benchmarks.simulation_accuracy --domains-file /tmp/domains.json

The engine is profiled, then measured in a closed loop at each concurrency, in several turns. The simulator
gets the recorded domains and one of two sets of round times: the profile alone, or the profile corrected by
the rounds of the first turn, which also give the time of the round loop. It is evaluated against the other
turns. Record the domains from the same prompts, because this tests the simulator, not whether other prompts
are similar. `--clock cpu` measures all times as the process's CPU time, which with one thread equals wall
time on an idle machine and stays comparable on a busy one.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import describe_arguments, describe_machine
from benchmarks.frontier_parts.planners import FixedLengthPlanSource
from benchmarks.frontier_parts.stack import LoadedLoop, Method, SliceResult
from dspark_core.engine.building import PAGE_TOKENS, EngineOptions, build_target
from dspark_core.engine.profiling.profile_file import write_profile
from dspark_core.engine.rounds.planning import LocalPlanSource
from dspark_core.evaluation.prompt_sets import read_prompt_set
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.records import RoundReport
from dspark_core.simulation.domains import DomainRounds, read_domains, stack_domains
from dspark_core.simulation.live_times import ServedRound, corrected
from dspark_core.simulation.running import World, simulate
from dspark_core.simulation.scenario import Scenario
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER
from services.verifier.config import DEFAULT_STEP_MS

Cell = tuple[str, int]
SIMULATED_PER_USER = 20
"""Simulated requests per user of the closed loop."""
MIN_SIMULATED = 200
"""Minimum number of simulated requests; fewer would be too noisy for a single user."""
STEP_SECONDS = DEFAULT_STEP_MS / 1000
"""Prefill is paced as in `dspark up`."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """Mean traffic of the closed loop."""

    prompt_tokens: float
    """Tokens not in the prefix cache, since prompts repeat."""
    answer_tokens: float
    max_tokens: int

    @classmethod
    def of(cls, prompts: Sequence[Sequence[int]], recorded: DomainRounds, max_tokens: int) -> Traffic:
        """Takes answer lengths from the recorded answers to these prompts."""
        new = [len(prompt) - PAGE_TOKENS * (-(-len(prompt) // PAGE_TOKENS) - 1) for prompt in prompts]
        return cls(
            prompt_tokens=statistics.fmean(new),
            answer_tokens=float(recorded.answer_tokens().clip(max=max_tokens).mean()),
            max_tokens=max_tokens,
        )


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    tokenizer = load_tokenizer(resolve_model_path(arguments.target_model))
    rows = read_prompt_set(arguments.prompts).rows
    prompts = [tokenizer.encode_chat(row.chat()) for row in rows]
    options = EngineOptions(
        target_model=arguments.target_model, drafter=arguments.drafter, kv_cache_bytes=2**30
    )
    loop = LoadedLoop(
        build_target(options),
        options,
        prompts,
        clock=CLOCKS[arguments.clock],
        max_step_seconds=STEP_SECONDS,
        max_running=max(arguments.concurrency),
        max_tokens=arguments.max_tokens,
        temperature=0.0,
        stop_token_ids=tokenizer.stop_token_ids,
    )
    assert loop.round_time is not None  # profiled by default
    console.print("profiled")
    loop.warm_prompts()
    methods = {
        "none": Method("none", FixedLengthPlanSource(0)),
        "fixed:4": Method("fixed:4", FixedLengthPlanSource(4)),
        "dspark": Method("dspark", LocalPlanSource(loop.round_time), lookup=True),
    }
    measured, served = _measure(arguments, loop, methods, console)
    recorded = stack_domains(read_domains(arguments.domains_file))
    times = {"profile": loop.round_time, "corrected": corrected(loop.round_time, served)}
    if arguments.save_curve is not None:
        write_profile(arguments.save_curve, times["corrected"])
    traffic = Traffic.of(prompts, recorded, arguments.max_tokens)
    results = [
        _compare(traffic, {name: World(recorded, one) for name, one in times.items()}, cell, slices)
        for cell, slices in measured.items()
    ]
    _show(results, console)
    document = {
        "benchmark": "simulation_accuracy",
        "arguments": describe_arguments(arguments),
        "environment": describe_machine(),
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _measure(
    arguments: argparse.Namespace, loop: LoadedLoop, methods: Mapping[str, Method], console: Console
) -> tuple[dict[Cell, list[SliceResult]], list[ServedRound]]:
    """Slices of all turns but the first, and the decode-only rounds of the first turn."""
    measured: dict[Cell, list[SliceResult]] = {}
    served: list[ServedRound] = []
    for turn in range(1 + arguments.turns):
        for concurrency in arguments.concurrency:
            for name, method in methods.items():
                one = loop.run_slice(method, concurrency, turn, arguments.seconds / arguments.turns)
                if turn:
                    measured.setdefault((name, concurrency), []).append(one)
                else:
                    served += map(_served, filter(_decodes_only, loop.plans.reports))
        console.print(f"turn {turn} of {arguments.turns} measured")
    return measured, served


def _decodes_only(report: RoundReport) -> bool:
    return report.batch_tokens == sum(1 + request.verify_length for request in report.requests)


def _served(report: RoundReport) -> ServedRound:
    return ServedRound(
        requests=len(report.requests),
        batch_tokens=report.batch_tokens,
        context_tokens=report.context_tokens,
        step_seconds=report.step_seconds,
        drafted=sum(request.drafted for request in report.requests),
        draft_seconds=report.draft_seconds,
        loop_seconds=report.loop_seconds,
    )


def _compare(
    traffic: Traffic, worlds: Mapping[str, World], cell: Cell, slices: Sequence[SliceResult]
) -> dict[str, object]:
    planner, concurrency = cell
    scenario = Scenario(
        verifiers=1,
        network_rtt_seconds=0.0,
        users=concurrency,
        max_running=concurrency,
        requests=max(SIMULATED_PER_USER * concurrency, MIN_SIMULATED),
        max_step_seconds=STEP_SECONDS,
        prompt_tokens=traffic.prompt_tokens,
        answer_tokens=traffic.answer_tokens,
        max_answer_tokens=traffic.max_tokens,
        fixed_lengths=True,
        coupled=True,  # greedy
    )
    rounds = sum(one.request_rounds for one in slices)
    speeds = [one.tokens / one.seconds for one in slices]
    speed = sum(one.tokens for one in slices) / sum(one.seconds for one in slices)
    result: dict[str, object] = {
        "planner": planner,
        "concurrency": concurrency,
        "measured_tokens_per_second": speed,
        "measured_range": [min(speeds), max(speeds)],
        "measured_accepted_length": 1.0 + sum(one.accepted for one in slices) / rounds,
        "measured_verify_length": sum(one.verified for one in slices) / rounds,
    }
    for name, world in worlds.items():
        summary = simulate(world, scenario, planner)
        result[name] = {
            "tokens_per_second": summary.steady_tokens_per_second,
            "accepted_length": summary.accepted_length,
            "verify_length": summary.verify_length,
            "error": summary.steady_tokens_per_second / speed - 1.0,
        }
    return result


def _show(results: Sequence[Mapping[str, Any]], console: Console) -> None:
    heads = ("planner", "users", "measured", "profile", "error", "corrected", "error", "accepted", "verified")
    table = Table(*heads, title="tokens/s; accepted and verified: measured / simulated (corrected)")
    for one in results:
        profile, live = one["profile"], one["corrected"]
        table.add_row(
            one["planner"],
            str(one["concurrency"]),
            f"{one['measured_tokens_per_second']:.1f}",
            f"{profile['tokens_per_second']:.1f}",
            f"{100 * profile['error']:+.1f} %",
            f"{live['tokens_per_second']:.1f}",
            f"{100 * live['error']:+.1f} %",
            f"{one['measured_accepted_length']:.2f}/{live['accepted_length']:.2f}",
            f"{one['measured_verify_length']:.2f}/{live['verify_length']:.2f}",
        )
    console.print(table)
    for name in ("profile", "corrected"):
        errors = [abs(one[name]["error"]) for one in results]
        console.print(
            f"{name}: mean error {100 * statistics.fmean(errors):.1f} %, largest {100 * max(errors):.1f} % "
            "(target: 15 %)"
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domains-file", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--seconds", type=float, default=8.0, help="seconds measured per load and planner")
    parser.add_argument(
        "--turns", type=int, default=2, help="slices to split these seconds into; one more corrects"
    )
    parser.add_argument("--prompts", type=Path, default=Path("loadtest/prompts.jsonl"))
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--target-model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument("--save-curve", type=Path, default=None, help="file for the corrected round times")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/simulation_accuracy.json"))
    return parser


if __name__ == "__main__":
    main()
