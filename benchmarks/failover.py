"""The cost of losing the scheduler, and the effect of a slow verifier: two verifiers, one drafter.

`python -m benchmarks.failover` starts the real services as processes and streams requests through the
gateway. It alternates between measuring tokens per second with the scheduler and after killing it (-9).
Then it slows the busier verifier down, and compares the requests sent to each verifier and their verify
lengths before and from two seconds after. Greedy answers to the same prompt must stay the same throughout,
token for token; this is enforced in float32.

The verifiers of greedy requests and of looked-up drafts need no capacity from the scheduler. With
`--temperature 0.7 --no-lookup` they plan by it, and the column "planned by it" says in how many rounds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from benchmarks.environment import describe_arguments, describe_machine
from benchmarks.failover_parts.clients import Load
from benchmarks.failover_parts.cluster import Cluster, ClusterOptions
from benchmarks.failover_parts.results import KillResult, ThrottleResult, tables
from benchmarks.failover_parts.windows import Window, watch

REACTION_SECONDS = 2.0
RETURN_SECONDS = 3.0
"""Time until all services have found the new scheduler."""


async def measure_kill(cluster: Cluster, load: Load, seconds: float, repeats: int) -> KillResult:
    """Alternate between with and without, so that drift of the machine affects both."""
    present = [await watch(cluster, load, seconds)]
    absent: list[Window] = []
    for _ in range(repeats):
        cluster.kill_scheduler()
        absent.append(await watch(cluster, load, seconds))
        await cluster.start_scheduler()
        await asyncio.sleep(RETURN_SECONDS)
        present.append(await watch(cluster, load, seconds))
    return KillResult(present=tuple(present), absent=tuple(absent))


async def measure_throttle(cluster: Cluster, load: Load, seconds: float, share: float) -> ThrottleResult:
    before = await watch(cluster, load, seconds)
    busiest = before.busiest
    with cluster.throttled(busiest, share):
        await asyncio.sleep(REACTION_SECONDS)
        after = await watch(cluster, load, seconds)
    return ThrottleResult(verifier=busiest, before=before, after=after)


async def run(arguments: argparse.Namespace, console: Console) -> dict[str, object]:
    cluster = Cluster(ClusterOptions(dtype=arguments.dtype, kernels=arguments.kernels))
    load = Load(
        cluster.gateway_address,
        arguments.concurrency,
        arguments.max_tokens,
        temperature=arguments.temperature,
        lookup=not arguments.no_lookup,
    )
    kill, throttle = None, None
    try:
        with console.status("starting the services"):
            await cluster.start()
        load.start()
        with console.status("warming up"):
            await asyncio.sleep(arguments.warm_up)
        if arguments.repeats:
            with console.status("killing the scheduler"):
                kill = await measure_kill(cluster, load, arguments.seconds, arguments.repeats)
        if not arguments.no_throttle:
            with console.status("slowing a verifier down"):
                throttle = await measure_throttle(cluster, load, arguments.seconds, arguments.share)
    finally:
        await load.stop()
        await cluster.stop()
    for table in tables(kill, throttle, load):
        console.print(table)
    for error in dict.fromkeys(load.errors):
        console.print(f"[red]a request failed: {error}[/red]")
    return {
        "environment": describe_machine(),
        "arguments": describe_arguments(arguments),
        "kill": kill and {**asdict(kill), "loss": kill.loss},
        "throttle": throttle and {**asdict(throttle), **throttle.summary()},
        "answers": sum(map(len, load.answers.values())),
        "prompts_answered_differently": load.differing,
        "errors": load.errors,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=8.0, help="length of each measurement")
    parser.add_argument("--repeats", type=int, default=3, help="how often to kill the scheduler")
    parser.add_argument("--no-throttle", action="store_true", help="skip the slow verifier")
    parser.add_argument(
        "--warm-up", type=float, default=5.0, help="seconds of load before the first measurement"
    )
    parser.add_argument("--concurrency", type=int, default=6, help="concurrent requests")
    parser.add_argument("--max-tokens", type=int, default=32, help="tokens per answer")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--no-lookup", action="store_true", help="only the drafter's drafts")
    parser.add_argument(
        "--share", type=float, default=0.25, help="share of time that the slowed verifier runs"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--kernels", choices=("on", "off"), default="on", help="off: slower steps, so that drafting pays"
    )
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    arguments = parser.parse_args()
    console = Console()
    result = asyncio.run(run(arguments, console))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failed = bool(result["errors"]) or bool(result["prompts_answered_differently"])
    return 1 if failed and arguments.dtype == "float32" else 0


if __name__ == "__main__":
    sys.exit(main())
