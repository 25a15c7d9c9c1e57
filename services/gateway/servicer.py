"""The gRPC API: converts, runs the same use case as REST, converts back."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, TypeAlias

import grpc
import grpc.aio
from dspark_proto.v1 import gateway_pb2, gateway_pb2_grpc

from services.common.interceptors import checks_first, limits_writes
from services.common.reflection import enable_reflection
from services.common.streams import closing
from services.gateway.callers.tiers import FLOOR_HEADER, Caller
from services.gateway.gateway import Gateway
from services.gateway.http.streaming import SEND_TIMEOUT_SECONDS
from services.gateway.proto_convert import chunk_to_proto, request_from_proto

_Context: TypeAlias = "grpc.aio.ServicerContext[Any, Any]"


def _check(servicer: GatewayServicer, context: _Context) -> None:
    servicer.caller(context)


class GatewayServicer(gateway_pb2_grpc.GatewayServiceServicer):
    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    def register(self, server: grpc.aio.Server) -> str:
        gateway_pb2_grpc.add_GatewayServiceServicer_to_server(self, server)
        name: str = gateway_pb2.DESCRIPTOR.services_by_name["GatewayService"].full_name
        # Users call this service by hand; the other services only talk to each other.
        enable_reflection(server, name)
        return name

    @checks_first(_check)
    async def ListModels(
        self, request: gateway_pb2.ListModelsRequest, context: _Context
    ) -> gateway_pb2.ListModelsResponse:
        self.caller(context)
        return gateway_pb2.ListModelsResponse(models=[self._gateway.model_name])

    @checks_first(_check)
    @limits_writes(SEND_TIMEOUT_SECONDS)
    async def Generate(
        self, request: gateway_pb2.GatewayGenerateRequest, context: _Context
    ) -> AsyncIterator[gateway_pb2.GatewayGenerateChunk]:
        caller = self.caller(context)
        request_id = self._gateway.answers.request_id("gen-")
        asked = caller.sends(request_from_proto(request, request_id, self._gateway.model_name))
        async with closing(self._gateway.generator.stream(asked, account=caller.account)) as deltas:
            async for timed in deltas:
                yield chunk_to_proto(timed, self._gateway.answers.call_id)

    def caller(self, context: _Context) -> Caller:
        """Raises AuthenticationError, or InvalidRequestError for a wrong floor."""
        given = _metadata(context)
        return self._gateway.api_keys.caller_of(given.get("authorization"), given.get(FLOOR_HEADER.lower()))


def _metadata(context: _Context) -> dict[str, str]:
    return {str(key): str(value) for key, value in (context.invocation_metadata() or ())}
