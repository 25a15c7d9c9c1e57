"""Lets tools like grpcurl ask a server what it offers, without a copy of the .proto files."""

from __future__ import annotations

import grpc.aio
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection


def enable_reflection(server: grpc.aio.Server, *services: str) -> None:
    """services: full names, `dspark.v1.GatewayService`; health and reflection itself are told too."""
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
