"""Tests the embedded stack under long mixed load: no leaks of memory or files, and stable answers.

    python -m benchmarks.soak [--minutes 30] [--concurrency 16]

Users send greedy, seeded and sampled requests without pause: streamed or whole answers, stop strings, long
prompts, clients that disconnect midway, and invalid requests. Once per period all users finish, and the idle
process is sampled: resident memory, open files, tasks, threads, and KV pages, which should all be free.
Greedy and seeded answers must stay the same. Exits with status 1 when something grows beyond its bound, an
answer changes or a request fails.

The KV cache is small by default, so that all its pages are used within a minute: reserved memory that is
first touched later would look like growth.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.environment import describe_arguments, describe_machine
from benchmarks.soak_parts.load import Load
from benchmarks.soak_parts.process import Sample, Serving
from benchmarks.soak_parts.verdict import Bounds, Growth, growth, held_pages

MIN_PERIODS = 6


def main() -> int:
    parser = _parser()
    arguments = parser.parse_args()
    if 60 * arguments.minutes < MIN_PERIODS * arguments.period_seconds:
        parser.error(f"--minutes {arguments.minutes:g} must hold {MIN_PERIODS} periods to judge growth by")
    console = Console()
    load, samples, status = asyncio.run(_soak(arguments, console))
    grown = growth(samples, Bounds(rss_mb=arguments.max_growth_mb))
    held = held_pages(samples)
    _show(console, samples, grown, load)
    failed = [f"{one.name} grew from {one.first:.0f} to {one.last:.0f}" for one in grown if not one.held]
    failed += [f"KV pages were held at minute {minute:.1f} with nobody served" for minute in held]
    failed += [f"answers differ: {one}" for one in load.differing] + load.errors
    if status:
        failed.append(f"the serving process ended with status {status}")
    for one in failed:
        console.print(f"FAILED: {one}", style="red", markup=False)
    document = {
        "benchmark": "soak",
        "arguments": describe_arguments(arguments),
        "environment": describe_machine(),
        "asked": dict(load.asked),
        "tokens": load.tokens,
        "answers_compared": load.compared,
        "answers_differing": load.differing,
        "failures": load.failures,
        "growth": [{**asdict(one), "held": one.held} for one in grown],
        "samples": [asdict(one) for one in samples],
        "failed": failed,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 1 if failed else 0


async def _soak(arguments: argparse.Namespace, console: Console) -> tuple[Load, list[Sample], int]:
    serving = await Serving.start(
        dtype=arguments.dtype, kv_cache_mb=arguments.kv_cache_mb, threads=arguments.threads
    )
    samples: list[Sample] = []
    try:
        load = Load(serving.url, await serving.model(), arguments.concurrency)
        started = time.monotonic()
        while len(samples) < MIN_PERIODS or time.monotonic() - started < 60 * arguments.minutes:
            before, began = load.tokens, time.monotonic()
            await load.run(arguments.period_seconds)
            speed = (load.tokens - before) / (time.monotonic() - began)
            one = await serving.sample((time.monotonic() - started) / 60, speed)
            samples.append(one)
            console.print(
                f"minute {one.minute:5.1f}: {one.rss_mb:.1f} MB, {one.open_files} files, {one.tasks} tasks, "
                f"{one.objects} objects, {100 * one.free_kv_fraction:.1f} % of KV free, "
                f"{one.tokens_per_second:.0f} tokens/s",
                soft_wrap=True,
            )
    finally:
        status = await serving.stop()
    return load, samples, status


def _show(console: Console, samples: Sequence[Sample], grown: Sequence[Growth], load: Load) -> None:
    speeds = [sample.tokens_per_second for sample in samples]
    asked = ", ".join(f"{count} {kind}" for kind, count in load.asked.most_common())
    console.print(f"{asked}; {load.tokens} tokens, {min(speeds):.0f} to {max(speeds):.0f} a second")
    console.print(
        f"{load.compared} answers compared, {len(load.differing)} differ; {load.failures} requests failed"
    )
    table = Table("of the idle process", "first third", "last third", "may grow by", "held")
    for one in grown:
        figures = (f"{one.first:.1f}", f"{one.last:.1f}", f"{one.bound:g}")
        table.add_row(one.name, *figures, "yes" if one.held else "NO")
    console.print(table)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--period-seconds", type=float, default=45.0, help="time between two samples")
    parser.add_argument("--concurrency", type=int, default=16, help="concurrent users")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--kv-cache-mb", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--max-growth-mb", type=float, default=Bounds().rss_mb, help="allowed growth of resident memory"
    )
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/soak.json"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
