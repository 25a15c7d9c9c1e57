"""Total against per-user throughput, by load, for each way of speculating: the paper's figures 7 and 8.

    python -m benchmarks.frontier [--minutes 12] [--mtp1 NAME] [--quick] [--fresh]

Closed loop: each concurrency level keeps that many requests running, and every finished answer starts the
next prompt. Methods alternate slice by slice in rotating order; medians are taken over slices. Every
finished visit of a concurrency is saved, so an interrupted run resumes when started again with the same
arguments, commit and processor; `--stop-after SECONDS` stops by itself (exit status 3 while visits remain),
for machines that are available only for short periods. With `--mtp1 none`, the block drafter's first token
alone ("gamma 1") stands in for MTP-1 and is labelled so. `--clock cpu` measures the process's CPU time,
which with one thread gives the times of an idle machine even on a busy one. Two methods are scheduled: one
with the drafter's drafts alone, which compares with the static methods, and what `dspark up` serves with,
drafts from the drafter or from lookup, whichever pays. Claims are judged for each.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from benchmarks.environment import describe_arguments, describe_machine
from benchmarks.frontier_parts.claims import Claim, FrontierPoint, check_claims, summarise
from benchmarks.frontier_parts.planners import FixedLengthPlanSource, ThresholdPlanSource
from benchmarks.frontier_parts.plots import draw
from benchmarks.frontier_parts.stack import LoadedLoop, Method, SliceResult
from benchmarks.frontier_parts.visits import Visit, keep, read_kept
from dspark_core.engine.building import EngineOptions, build_target
from dspark_core.engine.rounds.planning import LocalPlanSource
from dspark_core.evaluation.prompt_sets import read_prompt_set
from dspark_core.model_paths import DEFAULT_MODEL, resolve_model_path
from dspark_core.tokenization.loading import load_tokenizer
from dspark_core.zoo_paths import DEFAULT_DRAFTER

SCHEDULED = "DSpark scheduled"
WITH_LOOKUP = "DSpark scheduled, with lookup"
NO_SPECULATION = "no speculation"
MTP1 = "MTP-1"
STAND_IN = "gamma 1 (for MTP-1)"
SHIPPED_MTP1 = "smollm2-135m-instruct-mtp1"
FULL = (1, 2, 4, 8, 16, 32, 64)
QUICK = (1, 4, 16)
UNFINISHED = 3
"""Exit status while visits remain."""
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
OVERHEAD = 1.35
"""Ratio of total time to slice time: loading, prefill, warm-up, and slices prolonged by slow rounds."""


class Stack:
    """The engines, loaded once, with the methods that run on each loop."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        options = _options(arguments, arguments.drafter)
        tokenizer = load_tokenizer(resolve_model_path(options.target_model))
        rows = read_prompt_set(arguments.prompts).rows
        prompts = [tokenizer.encode_chat(row.chat()) for row in rows]
        settings: dict[str, Any] = {
            "max_running": max(arguments.concurrency),
            "max_tokens": arguments.max_tokens,
            "temperature": arguments.temperature,
            "stop_token_ids": tokenizer.stop_token_ids,
            "clock": CLOCKS[arguments.clock],
        }
        loop = LoadedLoop(build_target(options), options, prompts, **settings)
        methods = [Method(NO_SPECULATION, FixedLengthPlanSource(0))]
        methods += [Method(f"gamma {length}", FixedLengthPlanSource(length)) for length in arguments.gamma]
        methods.append(Method(f"threshold {arguments.threshold}", ThresholdPlanSource(arguments.threshold)))
        methods.append(Method(SCHEDULED, LocalPlanSource(loop.round_time)))
        methods.append(Method(WITH_LOOKUP, LocalPlanSource(loop.round_time), lookup=True))
        if arguments.mtp1 is None:
            methods.insert(1, Method(STAND_IN, FixedLengthPlanSource(1)))
        self.loops = [(loop, methods)]
        if arguments.mtp1 is not None:
            mtp_options = _options(arguments, arguments.mtp1)
            loop = LoadedLoop(build_target(mtp_options), mtp_options, prompts, profiled=False, **settings)
            self.loops.append((loop, [Method(MTP1, FixedLengthPlanSource(1))]))
        for loop, _ in self.loops:
            loop.warm_prompts()

    @property
    def methods(self) -> list[str]:
        return [method.name for _, methods in self.loops for method in methods]

    def visit(self, concurrency: int, turn: int, seconds: float) -> Iterator[SliceResult]:
        """Run one slice of every method, in an order that rotates with the turn."""
        order = [(loop, method) for loop, methods in self.loops for method in methods]
        shift = turn % len(order)
        for loop, method in order[shift:] + order[:shift]:
            yield loop.run_slice(method, concurrency, turn, seconds)


def main() -> int:
    arguments = _parser().parse_args()
    _fill_in(arguments)
    torch.set_num_threads(arguments.threads)
    console = Console()
    visits = _resume(arguments)
    done = {visit.place for visit in visits}
    every = [(turn, count) for turn in range(arguments.repetitions) for count in arguments.concurrency]
    to_go = [place for place in every if place not in done]
    if to_go:
        console.print(f"{len(done)} visits are on disk, {len(to_go)} to go")
        measured = _measure(arguments, to_go, console)
        visits += measured
        if left := len(to_go) - len(measured):
            console.print(f"{left} visits are left: start again with the same arguments")
            return UNFINISHED
    points = summarise([one for visit in visits for one in visit.slices])
    claims = _claims(arguments, points)
    _write(arguments, visits[-1].environment, points, claims)
    _show(console, points, claims)
    for path in draw(points, (SCHEDULED, WITH_LOOKUP), arguments.figures, _title(arguments)):
        console.print(f"written to {path}")
    return 0


def _measure(
    arguments: argparse.Namespace, places: Sequence[tuple[int, int]], console: Console
) -> list[Visit]:
    """The visits that fit into the time limit."""
    started = time.monotonic()
    stack = Stack(arguments)
    all_visits = arguments.repetitions * len(arguments.concurrency)
    seconds = 60.0 * arguments.minutes / OVERHEAD / (all_visits * len(stack.methods))
    console.print(f"{len(stack.methods)} methods, slices of {seconds:.1f} s or more")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    measured: list[Visit] = []
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("slices", total=len(places) * len(stack.methods))
        for turn, concurrency in places:
            late = arguments.stop_after is not None and time.monotonic() - started > arguments.stop_after
            if late and measured:
                return measured
            slices = []
            progress.update(task, description=f"turn {turn + 1}, {concurrency} users")
            for one in stack.visit(concurrency, turn, seconds):
                slices.append(one)
                progress.advance(task)
            measured.append(Visit(turn=turn, environment=describe_machine(), slices=tuple(slices)))
            keep(_visits_file(arguments), measured[-1])
            if not console.is_terminal:
                console.print(f"turn {turn + 1}, {concurrency} users: done")
    return measured


def _visits_file(arguments: argparse.Namespace) -> Path:
    """Named by a digest of the arguments, so that other arguments start over."""
    names = (
        *("target_model", "drafter", "mtp1", "dtype", "gamma", "threshold", "max_tokens", "temperature"),
        *("threads", "prompts", "minutes", "clock", "kv_cache_mb"),
    )
    asked = {name: str(getattr(arguments, name)) for name in names}
    key = hashlib.sha256(json.dumps(asked).encode()).hexdigest()[:8]
    return Path(arguments.out.with_suffix(f".{key}.slices.jsonl"))


def _resume(arguments: argparse.Namespace) -> list[Visit]:
    """Usable visits of an earlier run with the same arguments."""
    file = _visits_file(arguments)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.fresh:
        file.unlink(missing_ok=True)
    kept = read_kept(file, describe_machine())
    return [
        visit
        for visit in kept
        if visit.turn < arguments.repetitions and visit.place[1] in arguments.concurrency
    ]


def _claims(arguments: argparse.Namespace, points: Sequence[FrontierPoint]) -> tuple[Claim, ...]:
    claims: list[Claim] = []
    for scheduled in (SCHEDULED, WITH_LOOKUP):
        found = check_claims(
            points,
            scheduled=scheduled,
            statics=sorted({point.method for point in points} - {SCHEDULED, WITH_LOOKUP}),
            baseline=STAND_IN if arguments.mtp1 is None else MTP1,
            moderate_floor=arguments.moderate_floor,
            strict_floor=arguments.strict_floor,
        )
        claims += [dataclasses.replace(claim, name=f"{scheduled}: {claim.name}") for claim in found]
    return tuple(claims)


def _write(
    arguments: argparse.Namespace,
    environment: Mapping[str, object],
    points: Sequence[FrontierPoint],
    claims: Sequence[Claim],
) -> None:
    document = {
        "benchmark": "frontier",
        "arguments": describe_arguments(arguments),
        "environment": environment,
        "points": [dataclasses.asdict(point) for point in points],
        "claims": [dataclasses.asdict(claim) for claim in claims],
    }
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _show(console: Console, points: Sequence[FrontierPoint], claims: Sequence[Claim]) -> None:
    methods = list(dict.fromkeys(point.method for point in points))
    users = sorted({point.concurrency for point in points})
    cells = {(point.method, point.concurrency): point for point in points}
    columns: tuple[tuple[str, Callable[[FrontierPoint], str]], ...] = (
        ("tokens/s of all users", lambda p: f"{p.tokens_per_second:.1f}"),
        ("draft tokens verified per request and round", lambda p: f"{p.verify_length:.2f}"),
        ("accepted length", lambda p: f"{p.accepted_length:.2f}"),
    )
    for title, text in columns:
        table = Table("users", *methods, title=title)
        for count in users:
            row = [cells.get((method, count)) for method in methods]
            table.add_row(str(count), *("-" if point is None else text(point) for point in row))
        console.print(table)
    table = Table("claim", "target", "measured", "holds", title="claims")
    for claim in claims:
        verdict = {True: "yes", False: "NO", None: "?"}[claim.holds]
        table.add_row(claim.name, claim.target, claim.measured, verdict)
    console.print(table)


def _title(arguments: argparse.Namespace) -> str:
    model = Path(arguments.target_model).name
    return f"{model}, {arguments.dtype}, T = {arguments.temperature:g}, {arguments.threads} thread(s)"


def _options(arguments: argparse.Namespace, drafter: str) -> EngineOptions:
    return EngineOptions(
        target_model=arguments.target_model,
        drafter=drafter,
        dtype=arguments.dtype,
        kv_cache_bytes=arguments.kv_cache_mb * 2**20,
    )


def _fill_in(arguments: argparse.Namespace) -> None:
    """Fill in the defaults that depend on other arguments."""
    arguments.concurrency = arguments.concurrency or list(QUICK if arguments.quick else FULL)
    arguments.repetitions = arguments.repetitions or (1 if arguments.quick else 3)
    arguments.figures = arguments.figures or arguments.out.parent / "figures"
    arguments.minutes = arguments.minutes or (1.5 if arguments.quick else 11.0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="one short turn at 1, 4 and 16 users")
    parser.add_argument("--fresh", action="store_true", help="discard the slices of an earlier run")
    parser.add_argument(
        "--minutes",
        type=float,
        default=None,
        help="approximate length of the whole run (default: 11; --quick: 1.5)",
    )
    parser.add_argument(
        "--repetitions", type=int, default=None, help="turns over all loads (default: 3; --quick: 1)"
    )
    parser.add_argument(
        "--concurrency",
        type=int,
        nargs="+",
        default=None,
        help="numbers of concurrent users (default: 1 to 64)",
    )
    parser.add_argument("--gamma", type=int, nargs="+", default=[2, 4, 7], help="static verify lengths")
    parser.add_argument("--threshold", type=float, default=0.5)
    parser.add_argument(
        "--mtp1",
        default=SHIPPED_MTP1,
        metavar="NAME",
        type=lambda text: None if text == "none" else text,
        help="MTP-1 drafter of the target, by name or path, or none (default: %(default)s)",
    )
    parser.add_argument(
        "--moderate-floor", type=float, default=None, help="tokens/s (default: 60 %% of MTP-1 alone)"
    )
    parser.add_argument(
        "--strict-floor", type=float, default=None, help="tokens/s (default: 102 %% of MTP-1 alone)"
    )
    parser.add_argument("--prompts", type=Path, default=Path("loadtest/prompts.jsonl"))
    parser.add_argument("--max-tokens", type=int, default=192, help="tokens per answer")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--target-model", default=DEFAULT_MODEL)
    parser.add_argument("--drafter", default=DEFAULT_DRAFTER)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--kv-cache-mb", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=tuple(CLOCKS), default="wall")
    parser.add_argument(
        "--stop-after", type=float, default=None, metavar="SECONDS", help="start no visit after this time"
    )
    parser.add_argument(
        "--figures", type=Path, default=None, help="directory for figures (default: next to --out)"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/frontier.json"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
