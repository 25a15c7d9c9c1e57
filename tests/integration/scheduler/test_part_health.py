"""Health of a verifier's step times through real gRPC: a detail that never makes the process unhealthy."""

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dspark_core.algorithms.round_time import RoundTimeModel
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.engine.rounds.planning import LocalPlanSource
from services.common.channels import open_channel
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.verifier.metrics import profile_problem

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


async def test_a_verifier_without_a_profile_says_so_until_it_has_one():
    telemetry = Telemetry(service="verifier")
    local = LocalPlanSource(None)
    parts = {"profile": lambda: profile_problem(local)}
    server = GrpcServer(ServerOptions(port=0, host="127.0.0.1"), [], telemetry, parts=parts)
    await server.start()
    await server.mark_ready()
    async with open_channel(f"127.0.0.1:{server.port}") as channel:
        stub = health_pb2_grpc.HealthStub(channel)

        async def status(name: str) -> int:
            return (await stub.Check(health_pb2.HealthCheckRequest(service=name), timeout=20)).status

        assert (await status(""), await status("profile")) == (SERVING, NOT_SERVING)
        local.adopt(RoundTimeModel(StepTimeModel.of_curve((1, 2), (0.1, 0.1))))
        assert (await status(""), await status("profile")) == (SERVING, SERVING)
        with pytest.raises(grpc.RpcError) as refused:
            await status("unheard-of")
        assert refused.value.code() is grpc.StatusCode.NOT_FOUND
    await server.stop()
