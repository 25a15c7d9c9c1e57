"""The gRPC face: converts, runs the same use case as REST, converts back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import grpc.aio
from dspark_proto.v1 import gateway_pb2, gateway_pb2_grpc

from dspark_core.errors import InvalidRequestError
from services.common.convert import (
    adjustments_from_proto,
    finish_reason_to_proto,
    grammar_from_proto,
    logprobs_to_proto,
    speculation_from_proto,
    stats_to_proto,
)
from services.common.reflection import enable_reflection
from services.gateway.backend import closing
from services.gateway.gateway import Gateway
from services.gateway.generation import TimedDelta
from services.gateway.http_errors import AuthenticationError
from services.gateway.requests import ChatMessage, ChatRole, Conversation, TextRequest
from services.gateway.tiers import FLOOR_HEADER, Caller, Tier, floor_from_header

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def register(self, server: grpc.aio.Server) -> None:
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(self, server)
        # Users call this one by hand; the other services only ever talk to each other.
        enable_reflection(server, gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name)

    async def ListModels(
        self, request: gateway_pb2.ListModelsRequest, context: _Context
    ) -> gateway_pb2.ListModelsResponse:
        await self._authenticate(context)
        return gateway_pb2.ListModelsResponse(models=[self._gateway.model_name])

    async def Generate(
        self, request: gateway_pb2.GatewayGenerateRequest, context: _Context
    ) -> AsyncIterator[gateway_pb2.GatewayGenerateChunk]:
        tier = await self._authenticate(context)
        caller = Caller(
            tier=tier, asked_floor=floor_from_header(_metadata(context).get(FLOOR_HEADER.lower()))
        )
        request_id = self._gateway.answers.request_id("gen")
        asked = caller.sends(request_from_proto(request, request_id, self._gateway.model_name))
        async with closing(self._gateway.generator.stream(asked)) as deltas:
            async for timed in deltas:
                yield chunk_to_proto(timed)

    async def _authenticate(self, context: _Context) -> Tier:
        try:
            return self._gateway.api_keys.tier_of(_metadata(context).get("authorization"))
        except AuthenticationError as error:
            await context.abort(grpc.StatusCode.UNAUTHENTICATED, str(error))


def _metadata(context: _Context) -> dict[str, str]:
    return {str(key): str(value) for key, value in (context.invocation_metadata() or ())}


def request_from_proto(
    message: gateway_pb2.GatewayGenerateRequest, request_id: str, only_model: str
) -> TextRequest:
    """Raises InvalidRequestError naming the field."""
    return TextRequest(
        request_id=request_id,
        model=message.model or only_model,
        prompt=_prompt(message),
        max_tokens=message.max_tokens if message.HasField("max_tokens") else None,
        temperature=message.temperature if message.HasField("temperature") else None,
        top_p=message.top_p if message.HasField("top_p") else None,
        top_k=message.top_k if message.HasField("top_k") else None,
        min_p=message.min_p if message.HasField("min_p") else None,
        seed=message.seed if message.HasField("seed") else None,
        stop=tuple(message.stop),
        speculation=speculation_from_proto(message.speculation),
        min_tokens_per_second=(
            message.min_tokens_per_second if message.HasField("min_tokens_per_second") else None
        ),
        ignore_eos=message.ignore_eos,
        adjustments=adjustments_from_proto(message.adjustments),
        grammar=grammar_from_proto(message.grammar),
        top_logprobs=message.top_logprobs if message.HasField("top_logprobs") else None,
    )


def _prompt(message: gateway_pb2.GatewayGenerateRequest) -> Conversation | str:
    if message.HasField("prompt"):
        if message.messages:
            raise InvalidRequestError("send either messages or prompt, got both", field="prompt")
        return message.prompt
    entries = enumerate(message.messages)
    return Conversation(
        messages=tuple(ChatMessage(role=_role(entry.role, i), content=entry.content) for i, entry in entries)
    )


_ROLES = {role.value: role for role in ChatRole if role is not ChatRole.TOOL}
"""Calls of tools are for REST only."""


def _role(name: str, index: int) -> ChatRole:
    role = _ROLES.get(name)
    if role is None:
        field = f"messages[{index}].role"
        raise InvalidRequestError(f"{field} must be one of {', '.join(_ROLES)}, got {name!r}", field=field)
    return role


def chunk_to_proto(timed: TimedDelta) -> gateway_pb2.GatewayGenerateChunk:
    delta = timed.delta
    chunk = gateway_pb2.GatewayGenerateChunk(
        text=delta.text,
        token_ids=delta.token_ids,
        finish_reason=finish_reason_to_proto(delta.finish_reason),
        logprobs=logprobs_to_proto(token.logprobs for token in delta.logprobs),
    )
    if delta.finish_reason is not None:
        chunk.decode_tokens_per_second = timed.decode_tokens_per_second
        chunk.min_tokens_per_second = timed.min_tokens_per_second or 0.0
        chunk.usage.prompt_tokens = delta.usage.prompt_tokens
        chunk.usage.completion_tokens = delta.usage.completion_tokens
        chunk.usage.cached_prompt_tokens = delta.usage.cached_prompt_tokens
        if delta.stats is not None:
            chunk.stats.CopyFrom(stats_to_proto(delta.stats))
    return chunk
