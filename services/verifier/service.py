"""Assembles a verifier from a config: engine, profile, draft source, planner, round thread.

Used by the verifier process and by the embedded default, which passes a local draft source.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass, replace
from functools import partial

from prometheus_client import CollectorRegistry

from dspark_core.algorithms.round_time import DraftTimeModel, RoundTimeModel
from dspark_core.engine.building import BuiltTarget, EngineOptions, build_target
from dspark_core.engine.drafts.drafting import Drafting
from dspark_core.engine.drafts.lookup import LookupDrafting
from dspark_core.engine.grammars import GrammarCompiler, read_tokenizer
from dspark_core.engine.profiling.profile_file import replica_kind
from dspark_core.engine.protocols import DraftSource, PlanSource
from dspark_core.engine.rounds.batching import BatchLimits
from dspark_core.engine.rounds.loop import RoundLoop
from dspark_core.engine.rounds.planning import LocalPlanSource
from dspark_core.engine.rounds.verifier import Verifier
from dspark_core.engine.served_weights import served_weights
from dspark_core.engine.tracing.trace_writer import TraceWriter
from dspark_core.engine.tracing.traced_plans import TracingPlanSource
from dspark_core.records import Replica, ReplicaKind, Role, VerifierDescription
from services.verifier.metrics import ObservedPlanSource, VerifierMetrics
from services.verifier.plans import LOCAL_PLANNER, CoordinatedPlanSource
from services.verifier.profiling import ProfileOptions, start_profile

_log = logging.getLogger(__name__)

LOOK_SECONDS = 1.0
"""Interval between checks whether the verifier is broken."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfiledTarget:
    """A loaded target and its speed on this machine."""

    target: BuiltTarget
    kind: ReplicaKind
    """Replicas of this kind share step times."""
    round_time: RoundTimeModel | None
    """None: not profiled. Draft and network times are learned while serving."""
    weights: str
    """See `served_weights`."""


def load_profiled_target(options: EngineOptions, profile: ProfileOptions | None = None) -> ProfiledTarget:
    """Loads the weights, prepares the steps that serving will need and measures their times. Blocks, the
    measurement alone for a few seconds."""
    profile = profile or ProfileOptions()
    target = build_target(options)
    target.engine.prepare(profile.max_requests)
    kind = replica_kind(options, target.engine)
    round_time = start_profile(target.engine, kind, profile)
    return ProfiledTarget(
        target=target, kind=kind, round_time=round_time, weights=served_weights(options, target.facts)
    )


def describe(options: EngineOptions, profiled: ProfiledTarget) -> VerifierDescription:
    return VerifierDescription(
        model=options.target_model,
        vocab_size=profiled.target.facts.config.vocab_size,
        max_context_tokens=profiled.target.engine.max_context_tokens,
        weights=profiled.weights,
    )


def local_plans(profiled: ProfiledTarget, draft_time: DraftTimeModel | None = None) -> LocalPlanSource:
    """`draft_time` None: it is learned while serving."""
    round_time = profiled.round_time
    if round_time is not None and draft_time is not None:
        round_time = replace(round_time, draft=draft_time)
    return LocalPlanSource(round_time)


def build_verifier(
    profiled: ProfiledTarget,
    local: LocalPlanSource,
    coordinated: CoordinatedPlanSource | None,
    *,
    limits: BatchLimits,
    draft_source: DraftSource | None,
    draft_deadline_seconds: float,
    replica_id: str,
    metrics: CollectorRegistry,
    trace: TraceWriter | None = None,
    lookup: LookupDrafting | None = None,
    cohorts: int | None = None,
) -> Verifier:
    """`coordinated` wraps `local`; None: plan without a scheduler. `lookup` None: no looked-up drafts.
    `cohorts`: see `RoundLoop`.
    """
    engine = profiled.target.engine
    observed = VerifierMetrics(metrics)
    drafting = None
    if draft_source is not None:
        drafting = Drafting(draft_source, engine, deadline_seconds=draft_deadline_seconds)
        observed.watch_drafter(lambda: draft_source.connected)
    round_time = local.round_time
    observed.watch_planner(local)
    plans: PlanSource = coordinated or local

    def planner_name() -> str:
        return LOCAL_PLANNER if coordinated is None else coordinated.last_planner

    if trace is not None:
        observed.watch_trace(lambda: trace.dropped)
        plans = TracingPlanSource(
            plans,
            trace,
            sample=trace.options.sample,
            planner_name=planner_name,
            curve=None if round_time is None else round_time.to_dict(),
        )
    facts = profiled.target.facts
    grammars = GrammarCompiler(partial(read_tokenizer, facts.path), facts.config.vocab_size)
    grammars.prepare()
    rounds = RoundLoop(
        engine,
        ObservedPlanSource(plans, observed, planner_name),
        drafting=drafting,
        lookup=lookup,
        cohorts=cohorts,
        grammars=grammars,
        limits=limits,
        replica_id=replica_id,
        step_time=None if round_time is None else round_time.verify,
    )
    verifier = Verifier(rounds)
    observed.watch_status(lambda: verifier.status)
    return verifier


def replica(
    verifier: Verifier,
    *,
    replica_id: str,
    address: str,
    model: str,
    weights: str,
    draining: bool = False,
) -> Replica:
    """This verifier's current registration with the scheduler."""
    status = verifier.status
    return Replica(
        replica_id=replica_id,
        role=Role.VERIFIER,
        address=address,
        model=model,
        draining=draining or not status.healthy,
        running_requests=status.running_requests,
        waiting_requests=status.waiting_requests,
        free_kv_fraction=status.free_kv_fraction,
        weights=weights,
    )


async def until_broken(verifier: Verifier) -> None:
    """Returns when no more rounds can be expected; the process should then exit to be restarted."""
    while (problem := verifier.status.problem) is None:
        await asyncio.sleep(LOOK_SECONDS)
    _log.critical("the verifier is broken: %s", problem)
