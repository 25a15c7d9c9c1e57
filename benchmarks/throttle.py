"""How the scheduler treats a verifier that slows down: its share of requests, and how much it verifies.

`python -m benchmarks.throttle` starts the real services as processes (a scheduler, a drafter, two verifiers,
a gateway), long streams that stay on their verifier, and short requests that the scheduler distributes. Then
it slows one verifier's target down while its streams continue, and evaluates its traced rounds before and in
each second after. The kinds of slowdown take turns: `clock`, every pass takes FACTOR times as long; `cores`,
each draft token takes FACTOR times as long while the time of a plain pass stays, as when a machine loses
cores but no memory bandwidth; `both`, each draft token takes FACTOR times as long and the rest sqrt(FACTOR)
times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.environment import describe_arguments, describe_machine
from benchmarks.failover_parts.clients import Load
from benchmarks.failover_parts.cluster import Cluster, ClusterOptions
from benchmarks.throttle_parts.rounds import Stretch, stretch, traced_rounds
from benchmarks.throttle_parts.slowed_verifier import KINDS, THROTTLE_FILE

WINDOWS = BEFORE, FIRST, SECOND, LATER = ("before", "0 to 1 s", "1 to 2 s", "from 2 s on")
TEXTS = (
    "The keeper climbed the stairs, lit the lamp, and wrote the hour, the wind and the ships in his book.",
    "Mix flour, salt and yeast, add warm water, knead for ten minutes, and let the dough rest for an hour.",
    "Mercury, Venus, Earth, Mars, Jupiter, Saturn, Uranus and Neptune go round the Sun at their own pace.",
)
COPYING = tuple(f"Copy this text ten times, word for word, one copy a line: {text}" for text in TEXTS)
"""Prompts whose answers mostly repeat them, so that verifying some looked-up tokens pays, but not all."""
SETTLE_SECONDS = 4.0
"""Time until all started streams are decoding."""


class Trial:
    """Slows down one verifier at a time and keeps time spans by kind, verifier and window."""

    def __init__(self, cluster: Cluster, folder: Path, arguments: argparse.Namespace) -> None:
        self._cluster = cluster
        self._folder = folder
        self._arguments = arguments
        self.spans: dict[tuple[str, int, str], list[tuple[float, float]]] = defaultdict(list)
        self.requests: dict[tuple[str, str], list[float]] = defaultdict(list)
        """Share of the short requests sent to the slow verifier, per run."""
        self.errors: list[str] = []

    async def run(self, kind: str, slow: int) -> None:
        """Start the streams, then measure at full speed and while `slow` is slowed down."""
        address, options = self._cluster.gateway_address, self._arguments
        long = Load(
            address,
            options.streams,
            options.stream_tokens,
            options.temperature,
            ignore_eos=True,
            prompts=COPYING,
        )
        short = Load(address, options.short, options.short_tokens)
        long.start()
        await asyncio.sleep(SETTLE_SECONDS)
        short.start()
        try:
            await asyncio.sleep(1.0)
            await self._watch(kind, slow, BEFORE, options.seconds)
            throttle = self._folder / f"throttle-{slow}"
            throttle.write_text(f"{kind} {options.factor}", encoding="utf-8")
            try:
                for window in (FIRST, SECOND):
                    await self._watch(kind, slow, window, 1.0)
                await self._watch(kind, slow, LATER, options.seconds)
            finally:
                throttle.write_text("", encoding="utf-8")
        finally:
            await asyncio.gather(long.stop(), short.stop())
        self.errors += long.errors + short.errors
        await asyncio.sleep(options.rest)

    async def _watch(self, kind: str, slow: int, window: str, seconds: float) -> None:
        before, started = await self._cluster.counts(), time.time()
        await asyncio.sleep(seconds)
        self.spans[kind, slow, window].append((started, time.time()))
        sent = [
            now.since(then).requests for now, then in zip(await self._cluster.counts(), before, strict=True)
        ]
        if sum(sent):
            self.requests[kind, window].append(sent[slow] / sum(sent))

    def found(self) -> dict[str, dict[str, dict[str, float]]]:
        """Results by kind and window, over all runs."""
        rounds = [traced_rounds(self._folder / f"trace-{index}") for index in range(2)]
        result: dict[str, dict[str, dict[str, float]]] = {}
        for kind in KINDS:
            for window in WINDOWS:
                parts = [stretch(rounds[slow], self.spans[kind, slow, window]) for slow in range(2)]
                shares = self.requests[kind, window]
                merged = _merged(parts)
                merged["request_share"] = sum(shares) / len(shares) if shares else 0.0
                result.setdefault(kind, {})[window] = merged
        return result


def _merged(parts: Sequence[Stretch]) -> dict[str, float]:
    """Means over both verifiers, weighted by their rounds and requests."""
    rounds = sum(part.rounds for part in parts)
    request_rounds = sum(part.rounds * part.requests for part in parts)
    merged = {"rounds": float(rounds), "requests": request_rounds / max(rounds, 1)}
    for name in ("verify_length", "offered_length", "drafted_share"):
        merged[name] = sum(getattr(p, name) * p.rounds * p.requests for p in parts) / max(request_rounds, 1.0)
    merged["step_seconds"] = sum(part.step_seconds * part.rounds for part in parts) / max(rounds, 1)
    return merged


def table(kind: str, factor: float, windows: Mapping[str, Mapping[str, float]]) -> Table:
    made = Table(title=f"{kind}, {factor:g} times")
    for head in (
        "",
        "step, ms",
        "requests a round",
        "share of new requests",
        "verified",
        "offered",
        "rounds",
    ):
        made.add_column(head, justify="right")
    for window, one in windows.items():
        made.add_row(
            window,
            f"{1e3 * one['step_seconds']:.1f}",
            f"{one['requests']:.1f}",
            f"{100 * one['request_share']:.0f} %",
            f"{one['verify_length']:.2f}",
            f"{one['offered_length']:.2f}",
            f"{one['rounds']:.0f}",
        )
    return made


async def run(arguments: argparse.Namespace, console: Console) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for index in range(2):
            (folder / f"throttle-{index}").write_text("", encoding="utf-8")
        cluster = Cluster(
            ClusterOptions(
                dtype=arguments.dtype,
                kernels=arguments.kernels,
                kv_cache_mb=512,
                verifier_module="benchmarks.throttle_parts.slowed_verifier",
                verifier_environ={
                    THROTTLE_FILE: f"{folder}/throttle-{{index}}",
                    "DSPARK_TRACE_FILE": f"{folder}/trace-{{index}}",
                    "DSPARK_TRACE_SAMPLE": "1.0",
                    "DSPARK_LOOKUP": "false" if arguments.no_lookup else "true",
                },
            )
        )
        trial = Trial(cluster, folder, arguments)
        try:
            with console.status("starting the services"):
                await cluster.start()
            with console.status("slowing verifiers down"):
                for turn in range(arguments.turns):
                    for kind in KINDS:
                        await trial.run(kind, turn % 2)
        finally:
            await cluster.stop()
        found = trial.found()
    for kind in KINDS:
        console.print(table(kind, arguments.factor, found[kind]))
    return {
        "environment": describe_machine(),
        "arguments": describe_arguments(arguments),
        "found": found,
        "errors": trial.errors,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--turns", type=int, default=4, help="turns of each kind, alternating between the verifiers"
    )
    parser.add_argument("--factor", type=float, default=4.0, help="slowdown factor")
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="seconds measured before, and from 2 s after"
    )
    parser.add_argument("--rest", type=float, default=6.0, help="seconds between two, for times to recover")
    parser.add_argument("--streams", type=int, default=6, help="streams that stay")
    parser.add_argument("--stream-tokens", type=int, default=1500)
    parser.add_argument("--temperature", type=float, default=0.3, help="temperature of the streams")
    parser.add_argument("--short", type=int, default=2, help="concurrent short requests")
    parser.add_argument("--short-tokens", type=int, default=16)
    parser.add_argument("--no-lookup", action="store_true", help="draft with the drafter only")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--kernels", choices=("on", "off"), default="on")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    arguments = parser.parse_args()
    result = asyncio.run(run(arguments, Console()))
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 1 if result["errors"] else 0


if __name__ == "__main__":
    sys.exit(main())
