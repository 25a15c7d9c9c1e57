"""The verifier service with a target that can be slowed down, as on a throttled machine.

`python -m benchmarks.throttle_parts.slowed_verifier`; the file that `THROTTLE_FILE` names holds `KIND FACTOR`
or nothing. It is profiled at full speed. A slow pass sleeps, so it does not disturb the other processes.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from dspark_core.engine.building import EngineOptions
from dspark_core.engine.target.batch import Run
from dspark_core.engine.target.target_engine import TargetEngine
from services.common.process import run_process
from services.verifier.profiling import ProfileOptions
from services.verifier.service import ProfiledTarget, load_profiled_target
from services.verifier.wiring import run

THROTTLE_FILE = "DSPARK_BENCHMARK_THROTTLE_FILE"
CLOCK, CORES, BOTH = "clock", "cores", "both"
KINDS = (CLOCK, CORES, BOTH)
"""`clock`: every pass takes FACTOR times as long. `cores`: each token beyond a request's first takes FACTOR
times its share of a pass, while reading the weights, which dominates a plain pass, is as fast as before.
`both`: those tokens take FACTOR times as long, and the rest sqrt(FACTOR) times."""


class SlowedTarget:
    def __init__(self, engine: TargetEngine, path: Path) -> None:
        self._engine = engine
        self._path = path

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the engine has
        return getattr(self._engine, name)

    def forward(self, runs: Sequence[Run]) -> Tensor:
        started = time.perf_counter()
        logits = self._engine.forward(runs)
        elapsed = time.perf_counter() - started
        kind, _, factor = self._path.read_text(encoding="utf-8").partition(" ")
        if factor:
            tokens = sum(len(run.token_ids) for run in runs)
            time.sleep(more(kind, float(factor), 1.0 - len(runs) / tokens) * elapsed)
        return logits


def more(kind: str, factor: float, added: float) -> float:
    """Extra time as a share of a pass; `added`: share of its tokens that are not the first of a request."""
    rest = {CLOCK: factor, CORES: 1.0, BOTH: math.sqrt(factor)}[kind]
    return added * factor + (1.0 - added) * rest - 1.0


def load_slowed(options: EngineOptions, profile: ProfileOptions) -> ProfiledTarget:
    profiled = load_profiled_target(options, profile)
    engine: Any = SlowedTarget(profiled.target.engine, Path(os.environ[THROTTLE_FILE]))
    return dataclasses.replace(profiled, target=dataclasses.replace(profiled.target, engine=engine))


if __name__ == "__main__":
    run_process("verifier", partial(run, load_target=load_slowed))
