"""Simulated against measured throughput on this machine, by load and planner.

    python -m benchmarks.record_domains prompts=loadtest/prompts.jsonl --limit 20 --out /tmp/domains.json
    python -m benchmarks.simulation_accuracy --domains-file /tmp/domains.json

The engine is profiled, then measured in a closed loop at each concurrency; the simulator gets the
profile, the recorded domains and nothing else. Record the domains from the same prompts: what is
tested is the simulator, not whether other prompts are alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import describe_machine
from benchmarks.frontier_parts.planners import FixedLengthPlanSource
from benchmarks.frontier_parts.stack import LoadedLoop, Method, SliceResult
from dspark_core.engine.building import EngineOptions, build_target
from dspark_core.engine.planning import LocalPlanSource
from dspark_core.engine.profile_file import write_profile
from dspark_core.evaluation.prompt_sets import read_prompt_set
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.simulation.domains import read_domains, stack_domains
from dspark_core.simulation.running import World, simulate
from dspark_core.simulation.scenario import Scenario
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER

SIMULATED_PER_USER = 20
"""Requests simulated for each user of the closed loop."""


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    tokenizer = load_tokenizer(resolve_model_path(arguments.target_model))
    rows = read_prompt_set(arguments.prompts).rows
    prompts = [tokenizer.encode_chat([{"role": "user", "content": row.text}]) for row in rows]
    options = EngineOptions(
        target_model=arguments.target_model, drafter=arguments.drafter, kv_cache_bytes=2**30
    )
    loop = LoadedLoop(
        build_target(options),
        options,
        prompts,
        max_running=max(arguments.concurrency),
        max_tokens=arguments.max_tokens,
        temperature=0.0,
        stop_token_ids=tokenizer.stop_token_ids,
    )
    console.print("profiled")
    if arguments.save_curve is not None:
        write_profile(arguments.save_curve, loop.round_time)
    methods = {
        "none": Method("none", FixedLengthPlanSource(0)),
        "fixed:4": Method("fixed:4", FixedLengthPlanSource(4)),
        "dspark": Method("dspark", LocalPlanSource(loop.round_time)),
    }
    measured = _measure(arguments, loop, methods, console)
    world = World(stack_domains(read_domains(arguments.domains_file)), loop.round_time)
    results = [_compare(arguments, world, one, slices) for one, slices in measured.items()]
    _show(results, console)
    document = {
        "benchmark": "simulation_accuracy",
        "arguments": {name: str(value) for name, value in vars(arguments).items()},
        "environment": describe_machine(),
        "results": results,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _measure(
    arguments: argparse.Namespace, loop: LoadedLoop, methods: Mapping[str, Method], console: Console
) -> dict[tuple[str, int], list[SliceResult]]:
    measured: dict[tuple[str, int], list[SliceResult]] = {}
    for concurrency in arguments.concurrency:
        for turn in range(arguments.turns):
            for name, method in methods.items():
                one = loop.run_slice(method, concurrency, turn, arguments.seconds / arguments.turns)
                measured.setdefault((name, concurrency), []).append(one)
        console.print(f"{concurrency} users measured")
    return measured


def _compare(
    arguments: argparse.Namespace, world: World, cell: tuple[str, int], slices: Sequence[SliceResult]
) -> dict[str, object]:
    name, concurrency = cell
    scenario = Scenario(
        verifiers=1,
        network_rtt_seconds=0.0,
        users=concurrency,
        max_running=concurrency,
        requests=SIMULATED_PER_USER * concurrency,
        prompt_tokens=8,  # prompts come again: all but their last page is in the prefix cache
        answer_tokens=arguments.max_tokens * 0.75,
        max_answer_tokens=arguments.max_tokens,
        fixed_lengths=True,
        coupled=True,  # greedy
    )
    summary = simulate(world, scenario, name)
    rounds = sum(one.request_rounds for one in slices)
    speeds = [one.tokens / one.seconds for one in slices]
    speed = sum(one.tokens for one in slices) / sum(one.seconds for one in slices)
    return {
        "planner": name,
        "concurrency": concurrency,
        "measured_tokens_per_second": speed,
        "measured_range": [
            min(speeds),
            max(speeds),
        ],
        "measured_accepted_length": 1.0 + sum(one.accepted for one in slices) / rounds,
        "measured_verify_length": sum(one.verified for one in slices) / rounds,
        "measured_round_seconds": sum(s.seconds for s in slices) / sum(s.rounds for s in slices),
        "measured_overhead_seconds": statistics.fmean(
            (s.seconds - s.step_seconds - s.draft_seconds) / s.rounds for s in slices
        ),
        "simulated_tokens_per_second": summary.steady_tokens_per_second,
        "simulated_accepted_length": summary.accepted_length,
        "simulated_verify_length": summary.verify_length,
        "error": summary.steady_tokens_per_second / speed - 1.0,
    }


def _show(results: Sequence[Mapping[str, object]], console: Console) -> None:
    heads = ("planner", "users", "measured tokens/s", "simulated", "error", "accepted m/s", "verified m/s")
    table = Table(*heads)
    for one in results:
        table.add_row(
            str(one["planner"]),
            str(one["concurrency"]),
            f"{one['measured_tokens_per_second']:.1f}",
            f"{one['simulated_tokens_per_second']:.1f}",
            f"{100 * float(str(one['error'])):+.1f} %",
            f"{one['measured_accepted_length']:.2f} / {one['simulated_accepted_length']:.2f}",
            f"{one['measured_verify_length']:.2f} / {one['simulated_verify_length']:.2f}",
        )
    console.print(table)
    worst = max(abs(float(str(one["error"]))) for one in results)
    console.print(f"largest error {100 * worst:.1f} % (target: 15 %)")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--domains-file", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--seconds", type=float, default=8.0, help="measured per load and planner")
    parser.add_argument("--turns", type=int, default=3, help="slices these seconds are split into")
    parser.add_argument("--prompts", type=Path, default=Path("loadtest/prompts.jsonl"))
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--target-model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--save-curve", type=Path, default=None, help="write the measured round times here")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/simulation_accuracy.json"))
    return parser


if __name__ == "__main__":
    main()
