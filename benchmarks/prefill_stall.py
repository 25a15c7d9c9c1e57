"""How long running streams wait for their next token while a long prompt is prefilled.

    python -m benchmarks.prefill_stall [--streams 8] [--prompt-tokens 2000] [--budgets-ms 100 50 25]

Streams decode without speculation. Once all are running, a prompt is submitted, and every time between two
tokens of a stream is recorded until the prompt's first token. Settings are interleaved; times are pooled over
the repeats. The first row has no budget: only `prefill_chunk_tokens` limits prefill.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.environment import describe_arguments, describe_machine
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.building import EngineOptions, build_target
from dspark_core.engine.profiling.profiler import ProfileSettings, profile_step_time
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.records import GenerateRequest, SamplingParams, SpeculationOptions

STREAM_PROMPT_TOKENS = 64
WARM_UP_ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Arrival:
    """One prompt's arrival: inter-token times of the streams, and the prompt's time to first token."""

    gaps: list[float]
    quiet_gaps: list[float]
    """Inter-token times before the prompt arrived."""
    first_token_seconds: float


@dataclass(frozen=True, slots=True)
class Row:
    max_step_ms: float | None
    p50_ms: float
    p99_ms: float
    longest_ms: float
    quiet_p50_ms: float
    first_token_ms: float


def main() -> None:
    arguments = _parser().parse_args()
    torch.set_num_threads(arguments.threads)
    console = Console()
    engine = build_target(EngineOptions(target_model=DEFAULT_MODEL, drafter=None)).engine
    counts = tuple(count for count in ProfileSettings().requests if count <= 2 * arguments.streams)
    step_time = profile_step_time(engine, ProfileSettings(requests=counts, budget_seconds=6.0))
    budgets = [None, *arguments.budgets_ms]
    found: dict[float | None, list[Arrival]] = {budget: [] for budget in budgets}
    for _ in track(range(arguments.repeats), "prompts arrive", console=console):
        for budget in budgets:
            found[budget].append(_arrival(engine, step_time, arguments, budget))
    rows = [_row(budget, arrivals) for budget, arrivals in found.items()]
    _print(console, rows)
    document = {
        "benchmark": "prefill_stall",
        "arguments": describe_arguments(arguments),
        "environment": describe_machine(),
        "computed_by": engine.computed_by,
        "rows": [asdict(row) for row in rows],
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    console.print(f"written to {arguments.out}")


def _arrival(
    engine: TargetEngine, step_time: StepTimeModel, arguments: argparse.Namespace, budget_ms: float | None
) -> Arrival:
    limits = BatchLimits(max_step_seconds=None if budget_ms is None else budget_ms / 1000)
    loop = RoundLoop(engine, FullPlanSource(), limits=limits, step_time=step_time)
    for index in range(arguments.streams):
        loop.submit(_request(f"stream {index}", STREAM_PROMPT_TOKENS, 1000 + index, max_tokens=1000))
    for _ in range(WARM_UP_ROUNDS):
        loop.step()
    quiet_gaps = [_timed_round(loop)[0] for _ in range(WARM_UP_ROUNDS)]
    gaps = []
    loop.submit(_request("prompt", arguments.prompt_tokens, time.monotonic_ns(), max_tokens=2))
    arrived = False
    while not arrived:
        seconds, answered = _timed_round(loop)
        gaps.append(seconds)
        arrived = "prompt" in answered
    return Arrival(gaps, quiet_gaps, sum(gaps))


def _timed_round(loop: RoundLoop) -> tuple[float, set[str]]:
    """-> seconds of a round, which is the time between two tokens of a stream, and the requests answered."""
    started = time.perf_counter()
    outputs = loop.step()
    return time.perf_counter() - started, {output.request_id for output in outputs}


def _request(name: str, tokens: int, seed: int, *, max_tokens: int) -> GenerateRequest:
    """A request with a random prompt, so that no two share a prefix."""
    drawn = np.random.default_rng(seed).integers(100, 40000, tokens)
    return GenerateRequest(
        request_id=name,
        prompt_token_ids=tuple(drawn.tolist()),
        max_tokens=max_tokens,
        sampling=SamplingParams(temperature=0.0),
        speculation=SpeculationOptions(enabled=False),
    )


def _row(budget: float | None, arrivals: list[Arrival]) -> Row:
    gaps = 1000 * np.array([gap for arrival in arrivals for gap in arrival.gaps])
    quiet = [gap for arrival in arrivals for gap in arrival.quiet_gaps]
    return Row(
        max_step_ms=budget,
        p50_ms=float(np.percentile(gaps, 50)),
        p99_ms=float(np.percentile(gaps, 99)),
        longest_ms=float(gaps.max()),
        quiet_p50_ms=1000 * statistics.median(quiet),
        first_token_ms=1000 * statistics.median(arrival.first_token_seconds for arrival in arrivals),
    )


def _print(console: Console, rows: list[Row]) -> None:
    table = Table(title="ms between tokens of running streams while a prompt arrives")
    for name in ("budget", "p50", "p99", "longest", "p50 before", "prompt's first token"):
        table.add_column(name, justify="right")
    for row in rows:
        budget = "none" if row.max_step_ms is None else f"{row.max_step_ms:g}"
        values = (row.p50_ms, row.p99_ms, row.longest_ms, row.quiet_p50_ms, row.first_token_ms)
        table.add_row(budget, *(f"{value:.1f}" for value in values))
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-tokens", type=int, default=2000)
    parser.add_argument("--budgets-ms", type=float, nargs="+", default=[100.0, 50.0, 25.0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/prefill_stall.json"))
    return parser


if __name__ == "__main__":
    main()
