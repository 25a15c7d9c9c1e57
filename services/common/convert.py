"""Converts protobuf messages to records and back: generation requests and answers.

`cluster_convert` has the scheduler's messages. `*_from_proto` validates and raises InvalidRequestError naming
the field; `*_to_proto` takes records, which were validated when they were built. Tensors are left to drafter
and verifier: nothing here may load torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from dspark_proto.v1 import common_pb2, verifier_pb2

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import NO_ADJUSTMENTS, Grammar, GrammarKind, LogitAdjustments, check_bias_count
from dspark_core.records import (
    FinishReason,
    GenerateChunk,
    GenerateRequest,
    SamplingParams,
    SpeculationOptions,
    SpeculationStats,
    TokenLogprobs,
    Verification,
    VerifierDescription,
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
}
_FINISH_REASON_FROM = {number: value for value, number in _FINISH_REASON.items()}


def verification_to_proto(value: Verification | None) -> common_pb2.Verification:
    return common_pb2.VERIFICATION_UNSPECIFIED if value is None else _VERIFICATION[value]


def verification_from_proto(number: int, field: str = "verification") -> Verification | None:
    """None for unspecified: the server chooses."""
    if number == common_pb2.VERIFICATION_UNSPECIFIED:
        return None
    return known_value(_VERIFICATION_FROM, number, field)


def finish_reason_to_proto(value: FinishReason | None) -> common_pb2.FinishReason:
    return common_pb2.FINISH_REASON_UNSPECIFIED if value is None else _FINISH_REASON[value]


def finish_reason_from_proto(number: int) -> FinishReason | None:
    """None while the request is still running."""
    if number == common_pb2.FINISH_REASON_UNSPECIFIED:
        return None
    return known_value(_FINISH_REASON_FROM, number, "finish_reason")


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


def adjustments_to_proto(value: LogitAdjustments) -> common_pb2.LogitAdjustments:
    return common_pb2.LogitAdjustments(
        logit_bias=[
            common_pb2.TokenBias(token_id=token_id, bias=bias) for token_id, bias in value.logit_bias
        ],
        repetition_penalty=value.repetition_penalty,
        presence_penalty=value.presence_penalty,
        frequency_penalty=value.frequency_penalty,
        min_tokens=value.min_tokens,
    )


def adjustments_from_proto(message: common_pb2.LogitAdjustments) -> LogitAdjustments:
    check_bias_count(len(message.logit_bias))
    penalty = message.repetition_penalty if message.HasField("repetition_penalty") else 1.0
    return LogitAdjustments(
        logit_bias=tuple((entry.token_id, entry.bias) for entry in message.logit_bias),
        repetition_penalty=penalty,
        presence_penalty=message.presence_penalty,
        frequency_penalty=message.frequency_penalty,
        min_tokens=message.min_tokens,
    )


def grammar_to_proto(value: Grammar | None) -> common_pb2.Grammar | None:
    return None if value is None else common_pb2.Grammar(**{value.kind.value: value.text})


def grammar_from_proto(message: common_pb2.Grammar) -> Grammar | None:
    """None: the message is empty."""
    kind = message.WhichOneof("source")
    return None if kind is None else Grammar(kind=GrammarKind(kind), text=getattr(message, kind))


def logprobs_to_proto(values: Iterable[TokenLogprobs]) -> list[common_pb2.TokenLogprobs]:
    return [
        common_pb2.TokenLogprobs(
            logprob=value.logprob,
            top_token_ids=[token_id for token_id, _ in value.top],
            top_logprobs=[logprob for _, logprob in value.top],
        )
        for value in values
    ]


def logprobs_from_proto(messages: Iterable[common_pb2.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    return tuple(
        TokenLogprobs(message.logprob, tuple(zip(message.top_token_ids, message.top_logprobs, strict=True)))
        for message in messages
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
        verification=verification_from_proto(message.verification, "speculation.verification"),
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
        floor_promised=value.floor_promised,
        cache_salt=value.cache_salt,
        adjustments=None if value.adjustments == NO_ADJUSTMENTS else adjustments_to_proto(value.adjustments),
        generated_tokens=value.generated_tokens,
        attempt=value.attempt,
        top_logprobs=value.top_logprobs,
        grammar=grammar_to_proto(value.grammar),
        weights=value.weights,
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
        floor_promised=message.floor_promised,
        cache_salt=message.cache_salt,
        adjustments=adjustments_from_proto(message.adjustments),
        generated_tokens=message.generated_tokens,
        attempt=message.attempt,
        top_logprobs=message.top_logprobs if message.HasField("top_logprobs") else None,
        grammar=grammar_from_proto(message.grammar),
        weights=message.weights,
    )


def generate_chunk_to_proto(value: GenerateChunk) -> verifier_pb2.GenerateChunk:
    return verifier_pb2.GenerateChunk(
        token_ids=value.token_ids,
        finish_reason=finish_reason_to_proto(value.finish_reason),
        stats=None if value.stats is None else stats_to_proto(value.stats),
        cached_prompt_tokens=value.cached_prompt_tokens,
        logprobs=logprobs_to_proto(value.logprobs),
        weights=value.weights,
    )


def generate_chunk_from_proto(message: verifier_pb2.GenerateChunk) -> GenerateChunk:
    return GenerateChunk(
        token_ids=tuple(message.token_ids),
        finish_reason=finish_reason_from_proto(message.finish_reason),
        stats=stats_from_proto(message.stats) if message.HasField("stats") else None,
        cached_prompt_tokens=message.cached_prompt_tokens,
        logprobs=logprobs_from_proto(message.logprobs),
        weights=message.weights,
    )


def verifier_description_to_proto(value: VerifierDescription) -> verifier_pb2.DescribeVerifierResponse:
    return verifier_pb2.DescribeVerifierResponse(
        model=value.model,
        vocab_size=value.vocab_size,
        max_context_tokens=value.max_context_tokens,
        weights=value.weights,
    )


def verifier_description_from_proto(message: verifier_pb2.DescribeVerifierResponse) -> VerifierDescription:
    return VerifierDescription(
        model=message.model,
        vocab_size=message.vocab_size,
        max_context_tokens=message.max_context_tokens,
        weights=message.weights,
    )


def known_value(values: Mapping[Any, _T], number: int, field: str) -> _T:
    if number not in values:
        raise InvalidRequestError(f"{field} must be one of {sorted(values)}, got {number}", field=field)
    return values[number]
