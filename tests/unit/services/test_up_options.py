"""What `dspark up` is told wrong it says before it loads a model."""

from __future__ import annotations

import socket

import pytest

from dspark_core.errors import ConfigError
from services.cli.main import main
from services.cli.serving.client import GatewayClient
from services.embedded.options import StackOptions
from services.embedded.ports import require_free
from services.embedded.stack import batch_limits
from tests.support.ports import free_ports


@pytest.mark.parametrize(
    ("flag", "value", "rule"),
    [
        ("--port", 65536, "in [0, 65535]"),
        ("--grpc-port", -1, "in [0, 65535]"),
        ("--max-running", 0, "in [1, 16384]"),
        ("--max-running", 10**6, "in [1, 16384]"),
        ("--kv-cache-mb", 0, "in [1, 16777216]"),
        ("--kv-cache-mb", 10**12, "in [1, 16777216]"),
        ("--threads", 0, "in [1, 1024]"),
        ("--threads", 10**6, "in [1, 1024]"),  # PyTorch would take it and crash
    ],
)
def test_a_value_out_of_range_is_told_by_its_flag(capsys, flag, value, rule) -> None:
    assert main(["up", flag, str(value)]) == 2
    assert f"{flag} must be {rule}, got {value}" in capsys.readouterr().err


@pytest.mark.parametrize("way", [[], ["--disaggregated"]])
@pytest.mark.parametrize("flag", ["--port", "--grpc-port"])
def test_a_taken_port_is_told_at_once(capsys, way, flag) -> None:
    """The checkpoint does not exist: looking for it first would tell that."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        ports = {"--port": "0", "--grpc-port": "0", flag: port}
        flags = [part for pair in ports.items() for part in pair]
        assert main(["up", *way, *flags, "--target-model", "/nowhere"]) == 2
    shown = capsys.readouterr().err
    assert f"cannot listen on 127.0.0.1:{port}" in shown
    assert "stopping" not in shown  # nothing had started


def test_a_wrong_table_is_told_before_a_model_is_loaded(capsys) -> None:
    ports = ("--port", "0", "--grpc-port", "0")
    assert main(["up", *ports, "--ngrams", "nothing", "--target-model", "/nowhere"]) == 2
    assert "table of n-grams 'nothing' not found" in capsys.readouterr().err


def test_a_table_without_lookup_is_refused(capsys) -> None:
    assert main(["up", "--no-lookup", "--ngrams", "/nowhere"]) == 2
    assert "--ngrams /nowhere cannot be used with --no-lookup" in capsys.readouterr().err
    assert StackOptions(lookup=False, ngrams="none").ngrams == "none"


def test_a_free_port_is_left_free() -> None:
    (port,) = free_ports(1)
    require_free("127.0.0.1", (port, 0))
    require_free("127.0.0.1", (port,))
    with pytest.raises(ConfigError, match=r"203\.0\.113\.1"):
        require_free("203.0.113.1", (port,))  # not an address of this machine


@pytest.mark.parametrize(("running", "tokens"), [(32, 512), (600, 600), (16384, 16384)])
def test_all_requests_that_may_run_have_room_in_a_pass(running: int, tokens: int) -> None:
    options = StackOptions(max_running=running)
    assert batch_limits(options).max_batch_tokens == tokens
    assert options.engine.max_batch_tokens == tokens


def test_threads_may_be_left_to_torch() -> None:
    assert StackOptions().threads is None


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
@pytest.mark.parametrize("scheme", ["http://", ""])
def test_a_gateways_url_may_be_written_as_people_do(scheme, suffix) -> None:
    client = GatewayClient(f"{scheme}localhost:8000{suffix}")
    assert client.url == "http://localhost:8000"
    client.close()
