"""What `dspark up` makes of its flags, without starting anything."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import pytest

from dspark_core.errors import ConfigError
from dspark_core.tokenization.tool_formats import ToolFormat
from services.cli.serving import up
from services.gateway.config import GatewayConfig


def run(monkeypatch: pytest.MonkeyPatch, *flags: str) -> tuple[str, Any]:
    """-> which stack would have been started, and what it was told besides its options."""
    made: list[tuple[str, Any]] = []

    def standing_in(name: str) -> Callable[..., None]:
        return lambda options, told, *_: made.append((name, told))

    for name in ("EmbeddedStack", "ProcessStack"):
        monkeypatch.setattr(up, name, standing_in(name))

    async def serve(*_: object) -> int:
        return 0

    monkeypatch.setattr(up, "_serve", serve)
    parser = argparse.ArgumentParser()
    up.add_parser(parser.add_subparsers())
    assert up.run(parser.parse_args(["up", *flags])) == 0
    return made[0]


def test_the_format_of_calls_comes_by_flag_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSPARK_TOOL_FORMAT", raising=False)

    def told(*flags: str) -> ToolFormat | None:
        stack, gateway = run(monkeypatch, *flags)
        assert stack == "EmbeddedStack"
        assert isinstance(gateway, GatewayConfig)
        return gateway.tool_format

    assert told() is None
    assert told("--tool-format", "hermes") is ToolFormat.HERMES
    monkeypatch.setenv("DSPARK_TOOL_FORMAT", "llama3_json")
    assert told() is ToolFormat.LLAMA3_JSON
    assert told("--tool-format", "auto") is None


def test_thoughts_are_text_by_flag_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DSPARK_REASONING", raising=False)
    assert run(monkeypatch)[1].reasoning
    assert not run(monkeypatch, "--reasoning", "none")[1].reasoning
    monkeypatch.setenv("DSPARK_REASONING", "none")
    assert not run(monkeypatch)[1].reasoning
    assert run(monkeypatch, "--reasoning", "auto")[1].reasoning


def test_a_gateway_of_its_own_is_told_by_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = run(monkeypatch, "--disaggregated", "--tool-format", "hermes", "--reasoning", "none")
    assert asked == ("ProcessStack", {"DSPARK_TOOL_FORMAT": "hermes", "DSPARK_REASONING": "none"})
    assert run(monkeypatch, "--disaggregated") == ("ProcessStack", {})


def test_variables_of_the_chat_template_come_by_flag_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSPARK_CHAT_TEMPLATE_KWARGS", '{"a": 1}')
    assert run(monkeypatch)[1].chat_template_kwargs == {"a": 1}
    flag = ("--chat-template-kwargs", '{"enable_thinking": false}')
    assert run(monkeypatch, *flag)[1].chat_template_kwargs == {"enable_thinking": False}
    assert run(monkeypatch, "--disaggregated", *flag)[1] == {"DSPARK_CHAT_TEMPLATE_KWARGS": flag[1]}
    with pytest.raises(ConfigError, match="--chat-template-kwargs must be a JSON object, got '7'"):
        run(monkeypatch, "--chat-template-kwargs", "7")


def test_a_format_that_nobody_knows_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(monkeypatch, "--tool-format", "xml")
    assert "invalid choice: 'xml'" in capsys.readouterr().err
