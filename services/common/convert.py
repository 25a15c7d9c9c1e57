"""Protobuf messages to records and back: generation, replicas, reports and plans.

`*_from_proto` validates and raises InvalidRequestError naming the field; `*_to_proto` takes
records, which were validated when they were built. Tensors are the drafter's and verifier's
business: nothing here may load torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, TypeVar

from dspark_proto.v1 import common_pb2, scheduler_pb2, verifier_pb2

from dspark_core.errors import InvalidRequestError
from dspark_core.records import (
    MAX_COHORTS,
    AssignRequest,
    DraftOrigin,
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    Replica,
    ReplicaKind,
    RequestSurvival,
    Role,
    RoundReport,
    SamplingParams,
    SpeculationOptions,
    SpeculationStats,
    StepTime,
    Verification,
    VerifierDescription,
    VerifierLoad,
    VerifyPlan,
    check_speed_floor,
)

_T = TypeVar("_T")

_VERIFICATION = {
    Verification.REJECTION: common_pb2.VERIFICATION_REJECTION,
    Verification.COUPLED: common_pb2.VERIFICATION_COUPLED,
}
_VERIFICATION_FROM = {number: value for value, number in _VERIFICATION.items()}

_FINISH_REASON = {
    FinishReason.STOP: common_pb2.FINISH_REASON_STOP,
    FinishReason.LENGTH: common_pb2.FINISH_REASON_LENGTH,
    FinishReason.CANCELLED: common_pb2.FINISH_REASON_CANCELLED,
}
_FINISH_REASON_FROM = {number: value for value, number in _FINISH_REASON.items()}

_ROLE = {Role.DRAFTER: scheduler_pb2.ROLE_DRAFTER, Role.VERIFIER: scheduler_pb2.ROLE_VERIFIER}
_ROLE_FROM = {number: value for value, number in _ROLE.items()}


def verification_to_proto(value: Verification | None) -> common_pb2.Verification:
    return common_pb2.VERIFICATION_UNSPECIFIED if value is None else _VERIFICATION[value]


def verification_from_proto(number: int) -> Verification | None:
    """None for unspecified: the server chooses."""
    if number == common_pb2.VERIFICATION_UNSPECIFIED:
        return None
    return _known(_VERIFICATION_FROM, number, "verification")


def finish_reason_to_proto(value: FinishReason | None) -> common_pb2.FinishReason:
    return common_pb2.FINISH_REASON_UNSPECIFIED if value is None else _FINISH_REASON[value]


def finish_reason_from_proto(number: int) -> FinishReason | None:
    """None while the request still runs."""
    if number == common_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    return _known(_FINISH_REASON_FROM, number, "finish_reason")


def role_to_proto(value: Role | None) -> scheduler_pb2.Role:
    return scheduler_pb2.ROLE_UNSPECIFIED if value is None else _ROLE[value]


def role_from_proto(number: int) -> Role | None:
    """None for unspecified."""
    return None if number == scheduler_pb2.ROLE_UNSPECIFIED else _known(_ROLE_FROM, number, "role")


def sampling_to_proto(value: SamplingParams) -> common_pb2.SamplingParams:
    return common_pb2.SamplingParams(
        temperature=value.temperature,
        top_k=value.top_k,
        top_p=value.top_p,
        min_p=value.min_p,
        seed=value.seed,
    )


def sampling_from_proto(message: common_pb2.SamplingParams) -> SamplingParams:
    return SamplingParams(
        temperature=message.temperature,
        top_k=message.top_k,
        top_p=message.top_p if message.HasField("top_p") else 1.0,
        min_p=message.min_p,
        seed=message.seed if message.HasField("seed") else None,
    )


def speculation_to_proto(value: SpeculationOptions) -> common_pb2.SpeculationOptions:
    return common_pb2.SpeculationOptions(
        enabled=value.enabled,
        verification=verification_to_proto(value.verification),
        max_draft_tokens=value.max_draft_tokens,
        lookup=value.lookup,
    )


def speculation_from_proto(message: common_pb2.SpeculationOptions) -> SpeculationOptions:
    return SpeculationOptions(
        enabled=message.enabled if message.HasField("enabled") else True,
        verification=verification_from_proto(message.verification),
        max_draft_tokens=message.max_draft_tokens if message.HasField("max_draft_tokens") else None,
        lookup=message.lookup if message.HasField("lookup") else True,
    )


def stats_to_proto(value: SpeculationStats) -> common_pb2.SpeculationStats:
    return common_pb2.SpeculationStats(
        rounds=value.rounds,
        drafted_tokens=value.drafted_tokens,
        verified_tokens=value.verified_tokens,
        accepted_tokens=value.accepted_tokens,
        committed_tokens=value.committed_tokens,
        draft_seconds=value.draft_seconds,
        verify_seconds=value.verify_seconds,
        lookup_accepted_tokens=value.lookup_accepted_tokens,
    )


def stats_from_proto(message: common_pb2.SpeculationStats) -> SpeculationStats:
    return SpeculationStats(
        rounds=message.rounds,
        drafted_tokens=message.drafted_tokens,
        verified_tokens=message.verified_tokens,
        accepted_tokens=message.accepted_tokens,
        committed_tokens=message.committed_tokens,
        draft_seconds=message.draft_seconds,
        verify_seconds=message.verify_seconds,
        lookup_accepted_tokens=message.lookup_accepted_tokens,
    )


def generate_request_to_proto(value: GenerateRequest) -> verifier_pb2.GenerateRequest:
    return verifier_pb2.GenerateRequest(
        request_id=value.request_id,
        prompt_token_ids=value.prompt_token_ids,
        max_tokens=value.max_tokens or 0,
        sampling=sampling_to_proto(value.sampling),
        stop_token_ids=value.stop_token_ids,
        speculation=speculation_to_proto(value.speculation),
        min_tokens_per_second=value.min_tokens_per_second or 0.0,
        tier=value.tier,
    )


def generate_request_from_proto(message: verifier_pb2.GenerateRequest) -> GenerateRequest:
    return GenerateRequest(
        request_id=message.request_id,
        prompt_token_ids=tuple(message.prompt_token_ids),
        max_tokens=message.max_tokens or None,
        sampling=sampling_from_proto(message.sampling),
        stop_token_ids=tuple(message.stop_token_ids),
        speculation=speculation_from_proto(message.speculation),
        min_tokens_per_second=message.min_tokens_per_second or None,
        tier=message.tier,
    )


def generate_chunk_to_proto(value: GenerateChunk) -> verifier_pb2.GenerateChunk:
    return verifier_pb2.GenerateChunk(
        token_ids=value.token_ids,
        finish_reason=finish_reason_to_proto(value.finish_reason),
        stats=None if value.stats is None else stats_to_proto(value.stats),
        cached_prompt_tokens=value.cached_prompt_tokens,
    )


def generate_chunk_from_proto(message: verifier_pb2.GenerateChunk) -> GenerateChunk:
    return GenerateChunk(
        token_ids=tuple(message.token_ids),
        finish_reason=finish_reason_from_proto(message.finish_reason),
        stats=stats_from_proto(message.stats) if message.HasField("stats") else None,
        cached_prompt_tokens=message.cached_prompt_tokens,
    )


def verifier_description_to_proto(value: VerifierDescription) -> verifier_pb2.DescribeVerifierResponse:
    return verifier_pb2.DescribeVerifierResponse(
        model=value.model,
        vocab_size=value.vocab_size,
        max_context_tokens=value.max_context_tokens,
        dtype=value.dtype,
    )


def verifier_description_from_proto(message: verifier_pb2.DescribeVerifierResponse) -> VerifierDescription:
    return VerifierDescription(
        model=message.model,
        vocab_size=message.vocab_size,
        max_context_tokens=message.max_context_tokens,
        dtype=message.dtype,
    )


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
    )


def round_report_from_proto(message: scheduler_pb2.RoundReport) -> RoundReport:
    if not message.replica_id:
        raise InvalidRequestError("replica_id must be non-empty, got ''", field="replica_id")
    for name in ("step_seconds", "draft_seconds", "draft_compute_seconds", "hidden_draft_seconds"):
        seconds = getattr(message, name)
        if not (math.isfinite(seconds) and seconds >= 0):
            raise InvalidRequestError(f"{name} must be finite and >= 0, got {seconds}", field=name)
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
        profile=_profile_from_proto(message.profile),
        load=verifier_load_from_proto(message.load) if message.HasField("load") else None,
        kind=replica_kind_from_proto(message.kind) if message.HasField("kind") else None,
        draft_compute_seconds=message.draft_compute_seconds,
        drafter_id=message.drafter_id,
        drafter_primed=message.drafter_primed,
        hidden_draft_seconds=min(message.hidden_draft_seconds, message.draft_seconds),
        cohorts=max(message.cohorts, 1),
    )


def verifier_load_to_proto(value: VerifierLoad) -> scheduler_pb2.VerifierLoad:
    return scheduler_pb2.VerifierLoad(
        running_requests=value.running_requests,
        waiting_requests=value.waiting_requests,
        free_kv_fraction=value.free_kv_fraction,
        max_running_requests=value.max_running_requests,
        draining=value.draining,
        new_request_ids=value.new_request_ids,
        min_tokens_per_second=value.min_tokens_per_second,
    )


def verifier_load_from_proto(message: scheduler_pb2.VerifierLoad) -> VerifierLoad:
    return VerifierLoad(
        running_requests=message.running_requests,
        waiting_requests=message.waiting_requests,
        free_kv_fraction=message.free_kv_fraction,
        max_running_requests=message.max_running_requests,
        draining=message.draining,
        new_request_ids=tuple(message.new_request_ids),
        min_tokens_per_second=message.min_tokens_per_second,
    )


def assign_request_to_proto(value: AssignRequest) -> scheduler_pb2.AssignRequest:
    return scheduler_pb2.AssignRequest(
        request_id=value.request_id,
        model=value.model,
        prompt_tokens=value.prompt_tokens,
        exclude_replica_ids=value.exclude_replica_ids,
        prefix_hashes=value.prefix_hashes,
        min_tokens_per_second=value.min_tokens_per_second,
        tier=value.tier,
        wait_seconds=value.wait_seconds,
    )


def assign_request_from_proto(message: scheduler_pb2.AssignRequest) -> AssignRequest:
    return AssignRequest(
        request_id=message.request_id,
        model=message.model,
        prompt_tokens=message.prompt_tokens,
        exclude_replica_ids=tuple(message.exclude_replica_ids),
        prefix_hashes=tuple(message.prefix_hashes),
        min_tokens_per_second=message.min_tokens_per_second,
        tier=message.tier,
        wait_seconds=message.wait_seconds,
    )


def verify_plan_to_proto(value: VerifyPlan) -> scheduler_pb2.VerifyPlan:
    return scheduler_pb2.VerifyPlan(
        based_on_round=value.based_on_round,
        draft_token_capacity=value.draft_token_capacity,
        term=value.term,
        curve=_profile_to_proto(value.curve),
        temperatures=value.temperatures,
        biases=value.biases,
        draft_price=value.draft_price,
    )


def verify_plan_from_proto(message: scheduler_pb2.VerifyPlan) -> VerifyPlan:
    return VerifyPlan(
        based_on_round=message.based_on_round,
        draft_token_capacity=message.draft_token_capacity,
        term=message.term,
        curve=_profile_from_proto(message.curve),
        temperatures=tuple(message.temperatures),
        biases=tuple(message.biases),
        draft_price=message.draft_price,
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
    return RequestSurvival(
        sequence_id=message.sequence_id,
        survival=survival,
        verify_length=message.verify_length,
        accepted=message.accepted,
        min_tokens_per_second=message.min_tokens_per_second,
        origin=DraftOrigin.LOOKUP if message.looked_up else DraftOrigin.DRAFTER,
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


def _profile_from_proto(points: Iterable[scheduler_pb2.StepTime]) -> tuple[StepTime, ...]:
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
        if not (math.isfinite(point.seconds) and point.seconds > 0):
            raise InvalidRequestError(
                f"profile must have positive step_seconds, got {point.seconds}", field="profile"
            )
        if not 1 <= point.requests <= point.batch_tokens:
            raise InvalidRequestError(
                f"profile must have 1 <= requests <= batch_tokens, got {point.requests} and "
                f"{point.batch_tokens}",
                field="profile",
            )
    if len({(point.requests, point.batch_tokens, point.context_tokens) for point in profile}) < len(profile):
        raise InvalidRequestError("profile must not name a point twice", field="profile")
    return profile


def _known(values: Mapping[Any, _T], number: int, field: str) -> _T:
    if number not in values:
        raise InvalidRequestError(f"{field} must be one of {sorted(values)}, got {number}", field=field)
    return values[number]
