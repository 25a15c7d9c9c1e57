"""Inflicts faults on a cluster, drawn from a seed: parts are killed, halted or restarted, and come back."""

from __future__ import annotations

import asyncio
import random
import signal
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum

from benchmarks.chaos_parts.cluster import Cluster


class Fault(Enum):
    KILLED = "killed"
    """SIGKILL, started again a while later."""
    HALTED = "halted"
    """SIGSTOP for a while: it keeps its connections but does not answer."""
    RESTARTED = "restarted"
    """SIGTERM as in a rollout, then started again."""


WEIGHTS = {Fault.KILLED: 0.4, Fault.HALTED: 0.4, Fault.RESTARTED: 0.2}
TARGETS = ("redis", "scheduler-0", "scheduler-1", "drafter-0", "drafter-1", "verifier-0", "verifier-1")
"""All parts but the gateway, to which clients are connected."""


@dataclass(slots=True)
class Faults:
    """One fault at a time, so that a verifier always remains; `run` returns with every part back."""

    cluster: Cluster
    targets: Sequence[str]
    seed: int
    pause_seconds: tuple[float, float]
    down_seconds: tuple[float, float]
    tell: Callable[[str], None]
    done: Counter[str] = field(default_factory=Counter)
    longest_start_seconds: float = 0.0

    async def run(self, seconds: float) -> None:
        rng = random.Random(self.seed)
        ends = time.monotonic() + seconds
        while time.monotonic() < ends:
            await asyncio.sleep(rng.uniform(*self.pause_seconds))
            fault = rng.choices(list(WEIGHTS), list(WEIGHTS.values()))[0]
            name = rng.choice(self.targets)
            down = rng.uniform(*self.down_seconds)
            self.tell(f"{name} {fault.value} for {down:.1f} s")
            self.done[f"{name} {fault.value}"] += 1
            await self._inflict(fault, name, down)

    async def _inflict(self, fault: Fault, name: str, down: float) -> None:
        part = self.cluster.parts[name]
        if fault is Fault.HALTED:
            part.send(signal.SIGSTOP)
            await asyncio.sleep(down)
            part.send(signal.SIGCONT)
            return
        if fault is Fault.KILLED:
            part.kill()
        else:
            await part.stop()
        await asyncio.sleep(down)
        started = time.monotonic()
        await part.start()
        self.longest_start_seconds = max(self.longest_start_seconds, time.monotonic() - started)
