"""What losing the scheduler costs, and what a slow verifier changes: two verifiers, one drafter.

`python -m benchmarks.failover` starts the real services as processes, streams greedy requests
through the gateway, and measures tokens per second with the scheduler, after killing it (-9), and
with a new one; then slows one verifier down and counts who is sent requests and how much is verified
there, before and from two seconds after. Answers to the same prompt must be the same throughout:
in float32 they are compared token for token.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.environment import describe_machine
from benchmarks.failover_parts.clients import Load
from benchmarks.failover_parts.cluster import Cluster, ClusterOptions, VerifierCounts

REACTION_SECONDS = 2.0
MAX_LOSS = 0.10


@dataclass(frozen=True, slots=True, kw_only=True)
class KillResult:
    before_tokens_per_second: float
    without_tokens_per_second: float
    after_tokens_per_second: float
    """With a new scheduler."""

    @property
    def loss(self) -> float:
        """Share of throughput, against the mean of before and after: the machine drifts."""
        around = (self.before_tokens_per_second + self.after_tokens_per_second) / 2
        return 1.0 - self.without_tokens_per_second / around


@dataclass(frozen=True, slots=True, kw_only=True)
class ThrottleResult:
    """Of the verifier that is slowed down."""

    share_before: float
    """Of requests sent to it."""
    share_after: float
    verify_length_before: float
    verify_length_after: float


async def measure_kill(cluster: Cluster, load: Load, seconds: float) -> KillResult:
    before = await load.tokens_per_second(seconds)
    cluster.kill_scheduler()
    without = await load.tokens_per_second(seconds)
    await cluster.start_scheduler()
    await asyncio.sleep(REACTION_SECONDS)
    after = await load.tokens_per_second(seconds)
    return KillResult(
        before_tokens_per_second=before, without_tokens_per_second=without, after_tokens_per_second=after
    )


async def measure_throttle(cluster: Cluster, seconds: float, burners: int) -> ThrottleResult:
    before = await _window(cluster, seconds)
    with cluster.throttled(0, burners):
        await asyncio.sleep(REACTION_SECONDS)
        after = await _window(cluster, seconds)
    return ThrottleResult(
        share_before=_share(before),
        share_after=_share(after),
        verify_length_before=before[0].verify_length,
        verify_length_after=after[0].verify_length,
    )


async def _window(cluster: Cluster, seconds: float) -> list[VerifierCounts]:
    before = await cluster.counts()
    await asyncio.sleep(seconds)
    return [now.since(then) for now, then in zip(await cluster.counts(), before, strict=True)]


def _share(counts: list[VerifierCounts]) -> float:
    total = sum(count.requests for count in counts)
    return counts[0].requests / total if total else 0.0


def tables(kill: KillResult, throttle: ThrottleResult, load: Load) -> list[Table]:
    first = Table(title="killing the scheduler (two verifiers, one drafter)")
    for head in ("before", "without", "with a new one", "loss", "answers", "prompts answered differently"):
        first.add_column(head, justify="right")
    first.add_row(
        f"{kill.before_tokens_per_second:.1f} tok/s",
        f"{kill.without_tokens_per_second:.1f} tok/s",
        f"{kill.after_tokens_per_second:.1f} tok/s",
        f"{100 * kill.loss:.1f} %",
        str(sum(map(len, load.answers.values()))),
        str(len(load.differing)),
    )
    second = Table(title=f"slowing one verifier down, from {REACTION_SECONDS:g} s after")
    for head in ("", "before", "after"):
        second.add_column(head, justify="right")
    second.add_row(
        "share of requests", f"{100 * throttle.share_before:.0f} %", f"{100 * throttle.share_after:.0f} %"
    )
    second.add_row(
        "verify length", f"{throttle.verify_length_before:.2f}", f"{throttle.verify_length_after:.2f}"
    )
    return [first, second]


async def run(arguments: argparse.Namespace, console: Console) -> dict[str, object]:
    cluster = Cluster(ClusterOptions(dtype=arguments.dtype))
    load = Load(cluster.gateway_address, arguments.concurrency, arguments.max_tokens)
    try:
        with console.status("starting the services"):
            await cluster.start()
        load.start()
        with console.status("warming up"):
            await asyncio.sleep(arguments.warm_up)
        with console.status("killing the scheduler"):
            kill = await measure_kill(cluster, load, arguments.seconds)
        with console.status("slowing a verifier down"):
            throttle = await measure_throttle(cluster, arguments.seconds, arguments.burners)
    finally:
        await load.stop()
        await cluster.stop()
    for table in tables(kill, throttle, load):
        console.print(table)
    for error in dict.fromkeys(load.errors):
        console.print(f"[red]a request failed: {error}[/red]")
    return {
        "environment": describe_machine(),
        "options": {key: value for key, value in vars(arguments).items() if key != "output"},
        "kill": {**asdict(kill), "loss": kill.loss},
        "throttle": asdict(throttle),
        "answers": sum(map(len, load.answers.values())),
        "prompts_answered_differently": load.differing,
        "errors": load.errors,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--seconds", type=float, default=15.0, help="of each measurement")
    parser.add_argument("--warm-up", type=float, default=5.0, help="seconds of load before the first")
    parser.add_argument("--concurrency", type=int, default=6, help="requests at a time")
    parser.add_argument("--max-tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--burners", type=int, default=3, help="processes beside the slowed verifier")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    arguments = parser.parse_args()
    console = Console()
    result = asyncio.run(run(arguments, console))
    if arguments.output:
        arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failed = bool(result["errors"]) or bool(result["prompts_answered_differently"])
    return 1 if failed and arguments.dtype == "float32" else 0


if __name__ == "__main__":
    sys.exit(main())
