"""The dspark command with the embedded stack, and how it starts and stops."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from services.cli.main import main
from services.embedded.stack import EmbeddedStack
from tests.support.ports import free_ports

pytestmark = [pytest.mark.xdist_group("e2e"), pytest.mark.timeout(400)]

QUESTION = "What is the capital of France?"


def test_generate_prints_the_answer_and_its_speed(stack: EmbeddedStack, capsys) -> None:
    arguments = ["--prompt", QUESTION, "--temperature", "0", "--max-tokens", "24"]
    assert main(["generate", "--url", stack.url, *arguments]) == 0
    captured = capsys.readouterr()
    assert "Paris" in captured.out
    assert "tokens/s" in captured.err
    assert "accepted length" in captured.err
    assert main(["generate", "--url", stack.url, "--no-speculation", *arguments]) == 0
    assert "no speculation" in capsys.readouterr().err


def test_generate_keeps_to_a_schema(stack: EmbeddedStack, capsys, tmp_path) -> None:
    schema = tmp_path / "city.json"
    schema.write_text(
        '{"type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}}, "required": ["city"]}'
    )
    asked = [
        "generate",
        "--url",
        stack.url,
        "--prompt",
        "The capital of Italy, as JSON?",
        "--temperature",
        "0",
    ]
    assert main([*asked, "--max-tokens", "40", "--schema", str(schema), "--frequency-penalty", "0.5"]) == 0
    assert json.loads(capsys.readouterr().out)["city"] in ("Rome", "Oslo")
    schema.write_text("[1")
    assert main([*asked, "--schema", str(schema)]) != 0
    assert "city.json must be a JSON object, got '[1': Expecting" in capsys.readouterr().err


def test_generate_reads_standard_input(stack: EmbeddedStack, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(QUESTION))
    fields = ["--temperature", "0", "--max-tokens", "24", "--quiet"]
    assert main(["generate", "--url", stack.url, "--prompt", "-", *fields]) == 0
    captured = capsys.readouterr()
    assert "Paris" in captured.out
    assert captured.err == ""


def test_chat_keeps_the_conversation_and_shows_speed(stack: EmbeddedStack, capsys, monkeypatch) -> None:
    said = f"My name is Ada.\n/hlep\n{QUESTION}\n/reset\n/quit\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(said))
    assert main(["chat", "--url", stack.url, "--temperature", "0", "--max-tokens", "20"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("tokens/s") == 2
    assert "unknown command /hlep" in shown
    assert "Paris" in shown


def test_no_gateway_is_a_clear_error(capsys) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        assert main(["chat", "--url", url]) == 1
    assert f"no gateway answers at {url}" in capsys.readouterr().err


def test_the_gateways_refusal_is_shown(stack: EmbeddedStack, capsys) -> None:
    assert main(["generate", "--url", stack.url, "--prompt", "x", "--max-tokens", "-3"]) == 1
    shown = capsys.readouterr().err
    assert "400" in shown
    assert "max_tokens" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--target-model", "/nowhere/model.gguf"], "/nowhere/model.gguf"),
        (["--drafter", "no-such-drafter"], "no-such-drafter"),
    ],
)
def test_wrong_checkpoints_end_the_start_with_one_line(arguments, message, capsys) -> None:
    assert main(["up", "--port", "0", "--grpc-port", "0", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_doctor_finds_this_installation_sound(capsys) -> None:
    assert main(["doctor", "--dtype", "float32", "--kv-cache-mb", "64"]) == 0
    shown = capsys.readouterr().out
    assert "blocks of 7" in shown
    assert "huge pages" in shown
    assert "failed" not in shown


def test_up_serves_answers_the_demo_request_and_stops_on_ctrl_c(capsys) -> None:
    http_port, grpc_port = free_ports(2)
    command = [
        *(sys.executable, "-m", "services.cli.main", "up", "--demo-request"),
        *("--port", str(http_port), "--grpc-port", str(grpc_port), "--kv-cache-mb", "256", "--threads", "1"),
    ]
    environ = {
        **os.environ,
        "PYTHONPATH": ".:proto/gen",
        "PYTHONUNBUFFERED": "1",
        "DSPARK_API_KEYS": "secret",
        "OTEL_TRACES_EXPORTER": "console",
    }
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "press Ctrl-C" in line:
                break
        output = "".join(lines)
        assert f"http://127.0.0.1:{http_port}/v1" in output
        assert "accepted length" in output
        url = f"http://127.0.0.1:{http_port}"
        assert httpx.get(f"{url}/readyz").status_code == 200
        asking = ["generate", "--url", url, "--prompt", QUESTION, "--max-tokens", "2"]
        assert main(asking) == 1
        assert "401" in capsys.readouterr().err
        assert main([*asking, "--api-key", "secret"]) == 0
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait() == 0, rest
        assert "Traceback" not in rest
        assert '"service.name": "dspark-embedded"' in output + rest  # from the demo request's spans
        watchdog.cancel()


@contextlib.contextmanager
def starting(*flags: str, until: str) -> Iterator[subprocess.Popen[str]]:
    """Runs `dspark up` and waits until it has logged a line that contains `until`."""
    command = [sys.executable, "-m", "services.cli.main", "up", "--port", "0", "--grpc-port", "0", *flags]
    environ = {**os.environ, "PYTHONPATH": ".:proto/gen", "DSPARK_LOG_LEVEL": "INFO"}
    with subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True) as process:
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        assert process.stderr is not None
        assert any(until in line for line in process.stderr)
        yield process
        watchdog.cancel()


def test_up_can_be_interrupted_while_it_loads() -> None:
    with starting("--kv-cache-mb", "256", "--threads", "1", until="native kernels") as process:
        interrupted = time.monotonic()
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
        assert process.wait() == 0, rest
        assert time.monotonic() - interrupted < 10
        assert "Traceback" not in rest


def test_services_end_with_the_command_that_started_them() -> None:
    with starting("--disaggregated", until="ready on port") as process:
        process.kill()
        # The read ends when the last service has closed the pipe.
        assert "scheduler services.common.server: stopped" in process.stderr.read()


@pytest.mark.parametrize("during", ["loading", "answering"])
def test_generate_can_be_interrupted(during: str) -> None:
    command = [
        *(sys.executable, "-m", "services.cli.main", "generate", "--prompt", "Write a very long story."),
        *("--max-tokens", "6000", "--temperature", "1", "--kv-cache-mb", "256", "--threads", "1"),
    ]
    environ = {**os.environ, "PYTHONPATH": ".:proto/gen"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environ, stdout=pipe, stderr=pipe) as process:
        watchdog = threading.Timer(300, process.kill)
        watchdog.start()
        assert process.stdout is not None
        if during == "answering":
            assert process.stdout.read(20)
        else:
            while ".gguf" not in mapped_files(process.pid):
                assert process.poll() is None
                time.sleep(0.01)  # bounded by the watchdog
        interrupted = time.monotonic()
        process.send_signal(signal.SIGINT)
        shown = process.communicate()[1]
        assert process.returncode == 130, shown
        assert time.monotonic() - interrupted < 20  # the story would take minutes
        assert b"Traceback" not in shown
        watchdog.cancel()


def mapped_files(pid: int) -> str:
    """The process's mapped files, which include the model's weights once it is loaded."""
    return Path(f"/proc/{pid}/maps").read_text(encoding="utf-8")


def test_metrics_tell_of_rounds_and_requests(stack: EmbeddedStack) -> None:
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "Hi"}],
        "max_tokens": 4,
    }
    httpx.post(f"{stack.url}/v1/chat/completions", content=json.dumps(body), timeout=60).raise_for_status()
    metrics = httpx.get(f"{stack.url}/metrics").text
    for name in ("dspark_step_seconds_count", "dspark_running_requests", "dspark_gateway_tokens_total"):
        assert name in metrics
