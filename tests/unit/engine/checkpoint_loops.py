"""Builds round loops over targets and drafters from checkpoint directories."""

from __future__ import annotations

from pathlib import Path

import torch

from dspark_core.engine.building import EngineOptions, build_drafter, build_target
from dspark_core.engine.draft_engines.blocks import LocalDraftSource
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.rounds.loop import BatchLimits, RoundLoop
from dspark_core.engine.rounds.planning import FullPlanSource


def loop_of(directory: Path, drafter: str | None, *, native: bool = True, **limits: int) -> RoundLoop:
    """Verifies whole blocks. `drafter`: its directory's name below the target's; None: plain decoding."""
    path = None if drafter is None else str(directory / drafter)
    options = EngineOptions(
        target_model=str(directory), drafter=path, dtype="float32", kv_cache_bytes=2**22, native=native
    )
    engine = build_target(options).engine
    drafting = None
    if drafter is not None:
        source = LocalDraftSource(build_drafter(options, generator=torch.Generator().manual_seed(0)))
        drafting = Drafting(source, engine, deadline_seconds=5.0)
    return RoundLoop(
        engine,
        FullPlanSource(),
        drafting=drafting,
        limits=BatchLimits(**limits),
        generator=torch.Generator().manual_seed(0),
    )
