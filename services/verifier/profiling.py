"""Obtains a verifier's step times at start: measured, read from a file, or deliberately skipped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.drafts.lookup import BLOCK_TOKENS
from dspark_core.engine.profiling.profile_file import read_profile, write_profile
from dspark_core.engine.profiling.profiler import ProfileSettings, profile_step_time, request_counts
from dspark_core.engine.target.target_engine import TargetEngine
from dspark_core.records import ReplicaKind, StepTime

_log = logging.getLogger(__name__)

START_SECONDS = 6.0
"""Time that measuring may add to a start."""
MEASURE = "measure"
OFF = "off"


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOptions:
    source: str = MEASURE
    """"measure" at every start, "off", or a file: read if it matches this kind of replica, otherwise measured
    and written."""
    max_requests: int = 32
    """Most requests per step."""
    max_batch_tokens: int = 512
    """Most tokens per step."""
    lookup: bool = False
    """Whether drafts may also be looked up, in blocks longer than a drafter's."""


def start_profile(engine: TargetEngine, kind: ReplicaKind, options: ProfileOptions) -> RoundTimeModel | None:
    """None if profiling is off. Raises ConfigError for a file that is no profile or cannot be written."""
    if options.source == OFF:
        _log.warning(
            "this verifier was not profiled and does not know how long its steps take: it verifies "
            "only the first, likely draft tokens. Set DSPARK_PROFILE=measure, or run `dspark profile`."
        )
        return None
    path = None if options.source == MEASURE else Path(options.source)
    if path is not None and path.exists():
        stored = read_profile(path)
        if stored.verify.key == kind:
            _log.info("step times of %s read from %s", kind, path)
            return stored
        _log.warning("%s holds step times of %s; this is %s: measuring anew", path, stored.verify.key, kind)
    settings = ProfileSettings(
        requests=request_counts(options.max_requests),
        max_batch_tokens=options.max_batch_tokens,
        lookup_tokens=1 + BLOCK_TOKENS if options.lookup else None,
        budget_seconds=START_SECONDS,
    )
    measured = RoundTimeModel(profile_step_time(engine, settings, key=kind))
    _log.info("step time of %s: %s", kind, _summary(measured))
    if path is not None:
        write_profile(path, measured)
    return measured


def profile_points(round_time: RoundTimeModel | None) -> tuple[StepTime, ...]:
    """The measured points in the form sent to the scheduler; empty without a profile."""
    return () if round_time is None else round_time.verify.step_times()


def adopted(curve: Sequence[StepTime]) -> RoundTimeModel:
    """The model of step times sent by the scheduler."""
    return RoundTimeModel(StepTimeModel.of_step_times(curve))


def _summary(model: RoundTimeModel) -> str:
    points = model.verify.points
    return ", ".join(
        f"{1000 * p.seconds:.0f} ms @ {p.requests}x{p.batch_tokens / p.requests:g}" for p in points
    )
