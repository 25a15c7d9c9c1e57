"""Tests whether users notice when parts of a cluster are lost: random faults under mixed requests.

    python -m benchmarks.chaos [--minutes 10] [--concurrency 8] [--seed 0]

Runs Redis, two schedulers, two pairs of drafter and verifier, and a gateway as processes on this machine. The
users of `benchmarks.soak` send requests without pause while one part after another is killed (-9), halted
(SIGSTOP) or restarted. Greedy and seeded answers must not change, no request may fail, and in the end every
KV page must be free. Exits with status 1 otherwise.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from pathlib import Path

from rich.console import Console

from benchmarks.chaos_parts.cluster import Cluster
from benchmarks.chaos_parts.faults import TARGETS, Faults
from benchmarks.environment import describe_arguments, describe_machine
from benchmarks.soak_parts.load import Load

PERIOD_SECONDS = 20.0
"""Length of a period of load; all users finish their requests at its end."""
QUIET_SECONDS = 30.0
"""Time limit for pages to be freed after the last answer."""


def main() -> int:
    arguments = _parser().parse_args()
    console = Console()
    document = asyncio.run(_chaos(arguments, console))
    document = {
        "benchmark": "chaos",
        "arguments": describe_arguments(arguments),
        "environment": describe_machine(),
        **document,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")
    return 1 if document["failed"] else 0


async def _chaos(arguments: argparse.Namespace, console: Console) -> dict[str, object]:
    cluster = Cluster(dtype=arguments.dtype, kv_cache_mb=arguments.kv_cache_mb)
    started = time.monotonic()

    def tell(what: str) -> None:
        console.print(f"{time.monotonic() - started:6.1f} s  {what}", markup=False, soft_wrap=True)

    try:
        tell("starting")
        await cluster.start()
        load = Load(cluster.url, await cluster.model(), arguments.concurrency)
        tell("asking without faults")
        await load.run(arguments.warm_up_seconds)
        quiet_tokens, quiet_failures = load.tokens, load.failures
        faults = Faults(
            cluster,
            arguments.targets,
            arguments.seed,
            (arguments.min_pause_seconds, arguments.max_pause_seconds),
            (arguments.min_down_seconds, arguments.max_down_seconds),
            tell,
        )
        seconds = 60.0 * arguments.minutes
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            inflicting = group.create_task(faults.run(seconds))
            while not inflicting.done():
                await load.run(PERIOD_SECONDS)
        lasted = time.monotonic() - began
        held = await _held_pages(cluster)
    finally:
        await cluster.stop()
    failed = [f"answers differ: {one}" for one in load.differing] + load.errors
    failed += [f"{name} holds {100 * (1 - free):.1f} % of its KV pages" for name, free in held.items()]
    for one in failed:
        console.print(f"FAILED: {one}", style="red", markup=False)
    console.print(
        f"{sum(faults.done.values())} faults, {sum(load.asked.values())} requests, {load.failures} failed; "
        f"{load.compared} answers compared, {len(load.differing)} differ; "
        f"{quiet_tokens / arguments.warm_up_seconds:.0f} tokens/s before, "
        f"{(load.tokens - quiet_tokens) / lasted:.0f} with faults"
    )
    return {
        "faults": dict(faults.done),
        "longest_start_seconds": faults.longest_start_seconds,
        "asked": dict(load.asked),
        "answers_compared": load.compared,
        "answers_differing": load.differing,
        "failures": load.failures,
        "failures_without_faults": quiet_failures,
        "tokens_per_second_without_faults": quiet_tokens / arguments.warm_up_seconds,
        "tokens_per_second_with_faults": (load.tokens - quiet_tokens) / lasted,
        "failed": failed,
    }


async def _held_pages(cluster: Cluster) -> dict[str, float]:
    """Free share of the KV pages of each verifier that has not freed all of them in time."""
    ends = time.monotonic() + QUIET_SECONDS
    while True:
        held = {name: free for name, free in (await cluster.free_kv_fractions()).items() if free < 1.0}
        if not held or time.monotonic() > ends:
            return held
        await asyncio.sleep(0.5)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=10.0, help="minutes of faults")
    parser.add_argument(
        "--warm-up-seconds", type=float, default=40.0, help="time without faults at the start"
    )
    parser.add_argument("--concurrency", type=int, default=8, help="concurrent users")
    parser.add_argument("--seed", type=int, default=0, help="seed of the faults")
    parser.add_argument(
        "--min-pause-seconds", type=float, default=2.0, help="shortest pause between two faults"
    )
    parser.add_argument("--max-pause-seconds", type=float, default=8.0)
    parser.add_argument("--min-down-seconds", type=float, default=0.5, help="shortest downtime of a part")
    parser.add_argument("--max-down-seconds", type=float, default=10.0)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS, metavar="PART")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--kv-cache-mb", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/chaos.json"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
