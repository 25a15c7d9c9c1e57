"""Lets tools like grpcurl discover a server's methods without a copy of the .proto files."""

from __future__ import annotations

import grpc.aio
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection


def enable_reflection(server: grpc.aio.Server, *services: str) -> None:
    """`services`: full names such as `dspark.v1.GatewayService`; health and reflection are added."""
    reflection.enable_server_reflection((*services, health.SERVICE_NAME, reflection.SERVICE_NAME), server)
