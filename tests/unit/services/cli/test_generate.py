"""`dspark generate` and `dspark chat` before and around the answer, without a model."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import os
import signal
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from threading import Event
from typing import NoReturn

import httpx
import pytest

from dspark_core.errors import ConfigError
from services.cli.main import main
from services.cli.serving import generate
from services.cli.serving.client import GatewayClient
from services.common.exits import EXIT_CONFIG, EXIT_FAILURE, EXIT_INTERRUPTED
from tests.support.served_http import served


class Left(BaseException):
    """In the place of the end of the process."""


class SlowStack:
    """Loads in a thread."""

    url = "http://nowhere"

    def __init__(self, options: object) -> None:
        self.options = options

    @staticmethod
    def load() -> None: ...

    async def start(self) -> None:
        await asyncio.to_thread(self.load)

    async def stop(self) -> None:
        pass


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> type[SlowStack]:
    class Stack(SlowStack):
        pass

    monkeypatch.setattr(generate, "EmbeddedStack", Stack)
    monkeypatch.setattr(generate, "_print_answer", lambda *_: None)
    return Stack


@pytest.mark.parametrize("during", ["the load", "the answer"])
def test_ctrl_c_waits_neither_for_the_load_nor_for_the_answer(
    during: str, slow: type[SlowStack], monkeypatch: pytest.MonkeyPatch
) -> None:
    left: list[int] = []
    may_end, waited_for = Event(), []

    def work(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        waited_for.append(not may_end.wait(30))

    def leave(status: int) -> NoReturn:
        left.append(status)
        may_end.set()
        raise Left

    if during == "the load":
        monkeypatch.setattr(slow, "load", work)
    else:
        monkeypatch.setattr(generate, "_print_answer", work)
    monkeypatch.setattr(generate, "leave_at_once", leave)
    with contextlib.suppress(KeyboardInterrupt, Left):
        generate.run(_parsed("--prompt", "hi"))
    assert left == [EXIT_INTERRUPTED]
    assert waited_for == [False]


def _parsed(*flags: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    generate.add_parser(parser.add_subparsers())
    return parser.parse_args(["generate", *flags])


@pytest.mark.parametrize("terminal", [True, False])
def test_loading_is_told_on_a_terminal_only(
    terminal: bool, slow: type[SlowStack], monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setenv("FORCE_COLOR" if terminal else "TERM", "1" if terminal else "dumb")
    assert main(["generate", "--prompt", "hi"]) == 0
    shown = capsys.readouterr()
    assert ("Loading smollm2-135m-instruct" in shown.err) == terminal
    assert shown.out == ""
    assert main(["generate", "--prompt", "hi", "--quiet"]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("command", [["generate", "--prompt", "hi", "--target-model", "/nowhere"], ["chat"]])
@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--temperature", "nan"),
        ("--temperature", "inf"),
        ("--top-p", "nan"),
        ("--presence-penalty", "-inf"),
        ("--frequency-penalty", "nan"),
        ("--repetition-penalty", "inf"),
    ],
)
def test_a_number_that_json_cannot_say_is_refused_by_its_flag(command, flag, value, capsys) -> None:
    assert main([*command, f"{flag}={value}"]) == EXIT_CONFIG
    assert capsys.readouterr().err == f"dspark: {flag} must be a finite number, got {value}\n"


@pytest.mark.parametrize("command", [["generate", "--prompt", "hi", "--target-model", "/nowhere"], ["chat"]])
def test_a_key_that_no_header_can_hold_is_refused_without_telling_it(command, capsys) -> None:
    assert main([*command, "--api-key", "secret-kü"]) == EXIT_CONFIG
    told = "dspark: --api-key (or DSPARK_API_KEY) must be printable ASCII, but contains 'ü'\n"
    assert capsys.readouterr().err == told


@pytest.mark.parametrize("errors", ["surrogateescape", "strict"])
def test_a_prompt_of_other_bytes_than_utf_8_is_refused(
    errors: str, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    given = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), encoding="utf-8", errors=errors)
    monkeypatch.setattr("sys.stdin", given)
    assert main(["generate", "--prompt", "-", "--target-model", "/nowhere"]) == EXIT_CONFIG
    assert "dspark: --prompt must be UTF-8" in capsys.readouterr().err


def test_a_message_of_other_bytes_than_utf_8_is_refused() -> None:
    client = GatewayClient("http://127.0.0.1:9")
    with (
        contextlib.closing(client),
        pytest.raises(ConfigError, match=r"message must be UTF-8.*dce9' at character 3"),
    ):
        next(client.chat([{"role": "user", "content": "caf\udce9"}], model="m"))


@pytest.mark.parametrize(
    ("status", "body", "location", "problem"),
    [
        (200, "<html>Welcome</html>", None, "lists no model, got '<html>Welcome</html>'"),
        (200, '{"data": []}', None, "lists no model"),
        (200, '["gateway"]', None, "lists no model"),
        (
            302,
            "",
            "https://example.org/login",
            "redirects (302) to https://example.org/login: use that URL",
        ),
        (304, "nothing new", None, "the gateway answered 304"),
    ],
)
def test_what_is_no_gateway_is_told_in_a_line(status, body, location, problem, capsys) -> None:
    with http_server(body, status, location) as port:
        assert main(["generate", "--prompt", "hi", "--url", f"http://127.0.0.1:{port}"]) == EXIT_FAILURE
    told = capsys.readouterr().err
    assert problem in told
    assert told.startswith("dspark: ")
    assert told.count("\n") == 1


@pytest.mark.parametrize(
    "flags",
    [
        ["--target-model", "/nowhere"],
        ["--drafter", "none"],
        ["--dtype", "float32"],
        ["--device", "cpu"],
        ["--weights", "int8"],
        ["--kv-cache-mb", "64"],
        ["--threads", "1"],
        ["--ngrams", "none"],
        ["--no-lookup"],
    ],
)
def test_a_flag_about_the_model_is_refused_for_a_gateway_elsewhere(flags, capsys) -> None:
    assert main(["generate", "--prompt", "hi", "--url", "http://127.0.0.1:9", *flags]) == EXIT_CONFIG
    assert capsys.readouterr().err.startswith(f"dspark: {flags[0]} cannot be used with --url: ")


@contextlib.contextmanager
def http_server(body: str, status: int = 200, location: str | None = None) -> Iterator[int]:
    """Answers whatever is asked for, also to whoever takes it for a proxy -> its port."""

    class Answers(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(len(body)))
            if location is not None:
                self.send_header("location", location)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with served(Answers) as url:
        yield int(url.rpartition(":")[2])


def test_a_proxy_is_asked_for_what_is_elsewhere_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(url: str) -> str:
        with contextlib.closing(GatewayClient(url)) as client:
            return client.model()

    for name in ("NO_PROXY", "no_proxy", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    bodies = (f'{{"data": [{{"id": "{name}"}}]}}' for name in ("gateway", "proxy"))
    with http_server(next(bodies)) as gateway, http_server(next(bodies)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{proxy}")
        assert model(f"http://127.0.0.1:{gateway}") == "gateway"
        assert model(f"localhost:{gateway}/v1") == "gateway"
        assert model("http://gateway.example.org:8000") == "proxy"


def test_what_is_no_url_is_refused(capsys) -> None:
    with pytest.raises(httpx.InvalidURL):
        httpx.URL("http://[::1")
    assert main(["chat", "--url", "http://[::1"]) == EXIT_CONFIG
    assert "'http://[::1' is not the URL of a gateway" in capsys.readouterr().err
