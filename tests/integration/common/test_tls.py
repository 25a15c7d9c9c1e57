"""Who may call whom when the services have certificates: over real sockets, with real handshakes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import trustme
from grpc_health.v1 import health_pb2, health_pb2_grpc

from dspark_core.errors import ConfigError
from services.common.channels import open_channel
from services.common.env import Env
from services.common.options import ServerOptions
from services.common.server import GrpcServer
from services.common.telemetry import Telemetry
from services.common.tls import Tls
from tests.support.certificates import tls_environ, write_tls

AUTHORITY = trustme.CA()


@pytest.fixture
def tls(tmp_path: Path) -> Tls:
    return write_tls(tmp_path / "own", AUTHORITY)


@pytest.fixture
async def port(tls: Tls) -> AsyncIterator[int]:
    options = ServerOptions(port=0, host="127.0.0.1", drain_seconds=0.0, tls=tls)
    server = GrpcServer(options, [], Telemetry(service="verifier"))
    yield await server.start()
    await server.stop()


async def reached(port: int, tls: Tls | None) -> bool:
    async with open_channel(f"127.0.0.1:{port}", tls=tls) as channel:
        try:
            await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=15.0)
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.UNAVAILABLE:
                raise
            return False
        return True


async def test_services_of_one_authority_reach_each_other(port: int, tls: Tls, tmp_path: Path) -> None:
    assert await reached(port, tls)
    assert await reached(port, write_tls(tmp_path / "another", AUTHORITY))


async def test_nobody_else_does(port: int, tls: Tls, tmp_path: Path) -> None:
    assert not await reached(port, None)
    stranger = write_tls(tmp_path / "stranger")
    assert not await reached(port, stranger)
    # A stranger that knows the authority still has no certificate of it.
    half = Tls(certificate=stranger.certificate, key=stranger.key, authority=tls.authority)
    assert not await reached(port, half)


async def test_a_server_with_another_name_is_not_believed(port: int, tls: Tls) -> None:
    elsewhere = Tls(certificate=tls.certificate, key=tls.key, authority=tls.authority, name="elsewhere")
    assert not await reached(port, elsewhere)


async def test_a_server_takes_renewed_files_without_a_restart(port: int, tls: Tls) -> None:
    before = trustme.CA()
    renewed = write_tls(tls.certificate.parent, before)
    assert await reached(port, renewed)
    tls.certificate.unlink()  # while a secret is being replaced, what was read last holds
    kept = write_tls(tls.certificate.parent / "kept", before)
    assert await reached(port, kept)


def test_nothing_set_means_in_the_clear() -> None:
    assert Tls.from_env(Env({})) is None
    assert ServerOptions.from_env(Env({}), port=1, metrics_port=2).tls is None


def test_what_is_set_is_read(tls: Tls) -> None:
    assert Tls.from_env(Env(tls_environ(tls))) == tls


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"DSPARK_TLS_KEY": ""}, "go together; not set: DSPARK_TLS_KEY"),
        ({"DSPARK_TLS_CA": "/nowhere/ca.crt"}, "DSPARK_TLS_CA: cannot use /nowhere/ca.crt"),
        ({"DSPARK_TLS_CERT": "/nowhere/tls.crt"}, "DSPARK_TLS_CERT and DSPARK_TLS_KEY: cannot use /nowhere"),
    ],
)
def test_what_cannot_be_used_is_named(tls: Tls, change: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        Tls.from_env(Env({**tls_environ(tls), **change}))


def test_a_key_of_another_certificate_is_refused(tls: Tls, tmp_path: Path) -> None:
    other = write_tls(tmp_path / "other", AUTHORITY)
    with pytest.raises(ConfigError, match="DSPARK_TLS_CERT and DSPARK_TLS_KEY"):
        Tls(certificate=tls.certificate, key=other.key, authority=tls.authority)
