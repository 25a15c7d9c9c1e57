"""Converts protobuf messages to records and back: the scheduler's replicas, loads, reports and plans.

Validates like `services.common.convert`; no torch here either.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sized
from itertools import pairwise

from dspark_proto.v1 import scheduler_pb2

from dspark_core.errors import InvalidRequestError, require
from dspark_core.records import (
    MAX_COHORTS,
    AssignRequest,
    DraftOrigin,
    Replica,
    ReplicaKind,
    RequestSurvival,
    Role,
    RoundReport,
    ScalingBand,
    StepTime,
    VerifierLoad,
    VerifyPlan,
    check_speed_floor,
)
from services.common.convert import known_value
from services.common.limits import (
    LEAST_STEP_SECONDS,
    MOST_BATCH_TOKENS,
    MOST_BLOCK_TOKENS,
    MOST_ROUND_SECONDS,
    MOST_RUNNING,
)

MAX_POINTS, MAX_NEW_IDS, MAX_FLOORS, MAX_HASHES = 1024, 4096, 1024, 1024
"""Far more than verifiers and gateways send. The scheduler reads messages on its event loop, where everybody
waits meanwhile, and one that is accepted by its size can take a minute."""
_STEP_TIMES = f"in [{LEAST_STEP_SECONDS:g}, {MOST_ROUND_SECONDS:g}]"

_ROLE = {Role.DRAFTER: scheduler_pb2.ROLE_DRAFTER, Role.VERIFIER: scheduler_pb2.ROLE_VERIFIER}
_ROLE_FROM = {number: value for value, number in _ROLE.items()}


def role_to_proto(value: Role | None) -> scheduler_pb2.Role:
    return scheduler_pb2.ROLE_UNSPECIFIED if value is None else _ROLE[value]


def role_from_proto(number: int) -> Role | None:
    """None for unspecified."""
    return None if number == scheduler_pb2.ROLE_UNSPECIFIED else known_value(_ROLE_FROM, number, "role")


def replica_to_proto(value: Replica) -> scheduler_pb2.Replica:
    return scheduler_pb2.Replica(
        replica_id=value.replica_id,
        role=role_to_proto(value.role),
        address=value.address,
        model=value.model,
        draining=value.draining,
        running_requests=value.running_requests,
        waiting_requests=value.waiting_requests,
        free_kv_fraction=value.free_kv_fraction,
        weights=value.weights,
    )


def replica_from_proto(message: scheduler_pb2.Replica) -> Replica:
    role = role_from_proto(message.role)
    if role is None:
        raise InvalidRequestError("role must be drafter or verifier, got unspecified", field="role")
    return Replica(
        replica_id=message.replica_id,
        role=role,
        address=message.address,
        model=message.model,
        draining=message.draining,
        running_requests=message.running_requests,
        waiting_requests=message.waiting_requests,
        free_kv_fraction=message.free_kv_fraction,
        weights=message.weights,
    )


def round_report_to_proto(value: RoundReport) -> scheduler_pb2.RoundReport:
    return scheduler_pb2.RoundReport(
        replica_id=value.replica_id,
        round=value.round,
        requests=[
            scheduler_pb2.RequestSurvival(
                sequence_id=request.sequence_id,
                survival=request.survival,
                verify_length=request.verify_length,
                accepted=request.accepted,
                min_tokens_per_second=request.min_tokens_per_second,
                looked_up=request.origin is DraftOrigin.LOOKUP,
                temperature=request.temperature,
            )
            for request in value.requests
        ],
        batch_tokens=value.batch_tokens,
        step_seconds=value.step_seconds,
        draft_seconds=value.draft_seconds,
        profile=_profile_to_proto(value.profile),
        kind=None if value.kind is None else replica_kind_to_proto(value.kind),
        load=None if value.load is None else verifier_load_to_proto(value.load),
        context_tokens=value.context_tokens,
        draft_compute_seconds=value.draft_compute_seconds,
        drafter_id=value.drafter_id,
        drafter_primed=value.drafter_primed,
        hidden_draft_seconds=value.hidden_draft_seconds,
        cohorts=value.cohorts,
        loop_seconds=value.loop_seconds,
    )


def round_report_from_proto(message: scheduler_pb2.RoundReport) -> RoundReport:
    if not message.replica_id:
        raise InvalidRequestError("replica_id must be non-empty, got ''", field="replica_id")
    profile = _profile_from_proto(message.profile, "profile")
    _check_times(message)
    _check_count("requests", message.requests, MOST_RUNNING)
    lengths = [len(request.survival) for request in message.requests]
    longest, drafted = max(lengths, default=0), sum(lengths)
    require(longest <= MOST_BLOCK_TOKENS, "survival", longest, f"at most {MOST_BLOCK_TOKENS} values each")
    rule = f"at most {MOST_BATCH_TOKENS} values over all requests"
    require(drafted <= MOST_BATCH_TOKENS, "survival", drafted, rule)
    if message.cohorts > MAX_COHORTS:
        raise InvalidRequestError(f"cohorts must be <= {MAX_COHORTS}, got {message.cohorts}", field="cohorts")
    return RoundReport(
        replica_id=message.replica_id,
        round=message.round,
        requests=tuple(_survival_from_proto(request) for request in message.requests),
        batch_tokens=message.batch_tokens,
        step_seconds=message.step_seconds,
        draft_seconds=message.draft_seconds,
        context_tokens=message.context_tokens,
        profile=profile,
        load=verifier_load_from_proto(message.load) if message.HasField("load") else None,
        kind=replica_kind_from_proto(message.kind) if message.HasField("kind") else None,
        draft_compute_seconds=message.draft_compute_seconds,
        drafter_id=message.drafter_id,
        drafter_primed=message.drafter_primed,
        hidden_draft_seconds=min(message.hidden_draft_seconds, message.draft_seconds),
        cohorts=max(message.cohorts, 1),
        loop_seconds=message.loop_seconds,
    )


def _check_times(message: scheduler_pb2.RoundReport) -> None:
    """Estimates are sums, ratios and extrapolations of these times, for requests of other verifiers, too."""
    for name in ("draft_seconds", "draft_compute_seconds", "hidden_draft_seconds", "loop_seconds"):
        seconds = getattr(message, name)
        require(0.0 <= seconds <= MOST_ROUND_SECONDS, name, seconds, f"in [0, {MOST_ROUND_SECONDS:g}]")
    step = message.step_seconds
    require(not step or _is_step_time(step), "step_seconds", step, f"0 or {_STEP_TIMES}")


def _is_step_time(seconds: float) -> bool:
    return LEAST_STEP_SECONDS <= seconds <= MOST_ROUND_SECONDS


def verifier_load_to_proto(value: VerifierLoad) -> scheduler_pb2.VerifierLoad:
    return scheduler_pb2.VerifierLoad(
        running_requests=value.running_requests,
        waiting_requests=value.waiting_requests,
        free_kv_fraction=value.free_kv_fraction,
        max_running_requests=value.max_running_requests,
        draining=value.draining,
        new_request_ids=value.new_request_ids,
        speed_floors=value.speed_floors,
    )


def verifier_load_from_proto(message: scheduler_pb2.VerifierLoad) -> VerifierLoad:
    _check_count("new_request_ids", message.new_request_ids, MAX_NEW_IDS)
    _check_count("speed_floors", message.speed_floors, MAX_FLOORS)
    return VerifierLoad(
        running_requests=message.running_requests,
        waiting_requests=message.waiting_requests,
        free_kv_fraction=message.free_kv_fraction,
        max_running_requests=message.max_running_requests,
        draining=message.draining,
        new_request_ids=tuple(message.new_request_ids),
        speed_floors=tuple(message.speed_floors),
    )


def assign_request_to_proto(value: AssignRequest) -> scheduler_pb2.AssignRequest:
    return scheduler_pb2.AssignRequest(
        request_id=value.request_id,
        model=value.model,
        prompt_tokens=value.prompt_tokens,
        exclude_replica_ids=value.exclude_replica_ids,
        prefix_hashes=value.prefix_hashes,
        min_tokens_per_second=value.min_tokens_per_second,
        floor_promised=value.floor_promised,
        tier=value.tier,
        wait_seconds=value.wait_seconds,
        weights=value.weights,
    )


def assign_request_from_proto(message: scheduler_pb2.AssignRequest) -> AssignRequest:
    _check_count("prefix_hashes", message.prefix_hashes, MAX_HASHES)
    return AssignRequest(
        request_id=message.request_id,
        model=message.model,
        prompt_tokens=message.prompt_tokens,
        exclude_replica_ids=tuple(message.exclude_replica_ids),
        prefix_hashes=tuple(message.prefix_hashes),
        min_tokens_per_second=message.min_tokens_per_second,
        floor_promised=message.floor_promised,
        tier=message.tier,
        wait_seconds=message.wait_seconds,
        weights=message.weights,
    )


def verify_plan_to_proto(value: VerifyPlan) -> scheduler_pb2.VerifyPlan:
    return scheduler_pb2.VerifyPlan(
        based_on_round=value.based_on_round,
        draft_token_capacity=value.draft_token_capacity,
        term=value.term,
        curve=_profile_to_proto(value.curve),
        scalings=[
            scheduler_pb2.ScalingBand(
                up_to_temperature=band.up_to_temperature,
                temperatures=band.temperatures,
                biases=band.biases,
            )
            for band in value.scalings
        ],
        draft_price=value.draft_price,
    )


def verify_plan_from_proto(message: scheduler_pb2.VerifyPlan) -> VerifyPlan:
    price = message.draft_price
    require(0.0 <= price < math.inf, "draft_price", price, "a finite number >= 0")
    return VerifyPlan(
        based_on_round=message.based_on_round,
        draft_token_capacity=message.draft_token_capacity,
        term=message.term,
        curve=_profile_from_proto(message.curve, "curve"),
        scalings=tuple(
            ScalingBand(
                up_to_temperature=band.up_to_temperature,
                temperatures=tuple(band.temperatures),
                biases=tuple(band.biases),
            )
            for band in message.scalings
        ),
        draft_price=price,
    )


def _survival_from_proto(message: scheduler_pb2.RequestSurvival) -> RequestSurvival:
    survival = tuple(message.survival)
    if not all(0.0 <= value <= 1.0 for value in survival) or any(a < b for a, b in pairwise(survival)):
        raise InvalidRequestError(
            f"survival must be non-increasing and in [0, 1], got {list(survival)}", field="survival"
        )
    check_speed_floor(message.min_tokens_per_second or None)
    if message.accepted > message.verify_length:
        raise InvalidRequestError(
            f"accepted must be <= verify_length ({message.verify_length}), got {message.accepted}",
            field="accepted",
        )
    if not message.temperature >= 0.0:
        raise InvalidRequestError(f"temperature must be >= 0, got {message.temperature}", field="temperature")
    return RequestSurvival(
        sequence_id=message.sequence_id,
        survival=survival,
        verify_length=message.verify_length,
        accepted=message.accepted,
        min_tokens_per_second=message.min_tokens_per_second,
        origin=DraftOrigin.LOOKUP if message.looked_up else DraftOrigin.DRAFTER,
        temperature=message.temperature,
    )


def replica_kind_to_proto(value: ReplicaKind) -> scheduler_pb2.ReplicaKind:
    return scheduler_pb2.ReplicaKind(
        model=value.model, engine=value.engine, hardware=value.hardware, dtype=value.dtype
    )


def replica_kind_from_proto(message: scheduler_pb2.ReplicaKind) -> ReplicaKind:
    return ReplicaKind(
        model=message.model, engine=message.engine, hardware=message.hardware, dtype=message.dtype
    )


def _profile_to_proto(points: Iterable[StepTime]) -> list[scheduler_pb2.StepTime]:
    return [
        scheduler_pb2.StepTime(
            batch_tokens=point.batch_tokens,
            step_seconds=point.seconds,
            requests=point.requests,
            context_tokens=point.context_tokens,
        )
        for point in points
    ]


def _profile_from_proto(points: Collection[scheduler_pb2.StepTime], name: str) -> tuple[StepTime, ...]:
    _check_count(name, points, MAX_POINTS)
    profile = tuple(
        StepTime(
            requests=point.requests or 1,
            batch_tokens=point.batch_tokens,
            context_tokens=point.context_tokens,
            seconds=point.step_seconds,
        )
        for point in points
    )
    for point in profile:
        if not _is_step_time(point.seconds):
            raise InvalidRequestError(
                f"{name} must have step_seconds {_STEP_TIMES}, got {point.seconds}", field=name
            )
        if not 1 <= point.requests <= point.batch_tokens:
            raise InvalidRequestError(
                f"{name} must have 1 <= requests <= batch_tokens, got {point.requests} and "
                f"{point.batch_tokens}",
                field=name,
            )
    if len({(point.requests, point.batch_tokens, point.context_tokens) for point in profile}) < len(profile):
        raise InvalidRequestError(f"{name} must not name a point twice", field=name)
    return profile


def _check_count(name: str, values: Sized, most: int) -> None:
    require(len(values) <= most, name, len(values), f"at most {most} entries")
