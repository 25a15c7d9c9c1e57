"""`dspark up --disaggregated` tells which of its processes ended and how; without a drafter it goes on."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import pytest

from services.cli.serving import up
from services.embedded.options import StackOptions
from services.embedded.processes import ProcessStack
from tests.support.polling import eventually


@dataclass
class Process:
    exit_code: int | None = None


class Stack(ProcessStack):
    """Processes that are there already."""

    def __init__(self) -> None:
        super().__init__(StackOptions())
        roles: Any = {role: Process() for role in ("scheduler", "drafter", "verifier", "gateway")}
        self.processes = roles

    async def start(self) -> None:
        """They run."""

    async def stop(self) -> None:
        """Nobody has to."""


@pytest.mark.parametrize(
    ("role", "code", "told"),
    [
        ("verifier", -9, "the verifier has ended (killed by signal 9), stopping the others"),
        ("scheduler", 1, "the scheduler has ended (exit code 1), stopping the others"),
        ("gateway", 0, "the gateway has ended (exit code 0), stopping the others"),
    ],
)
async def test_the_service_that_ended_is_named(
    capsys: pytest.CaptureFixture[str], role: str, code: int, told: str
) -> None:
    stack: Any = Stack()
    stack.processes[role].exit_code = code
    assert await asyncio.wait_for(up._serve(stack, StackOptions(), None), 15) == 1
    assert told in " ".join(capsys.readouterr().err.split())


async def test_a_drafter_that_ended_is_told_of_once_and_not_waited_for(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    stack: Any = Stack()
    stack.processes["drafter"].exit_code = -9
    waiting = asyncio.create_task(stack.wait())
    await eventually(lambda: bool(caplog.records))
    assert not waiting.done()
    stack.processes["gateway"].exit_code = 2
    assert await asyncio.wait_for(waiting, 15) == "the gateway has ended (exit code 2)"
    (told,) = caplog.messages
    assert told.startswith("the drafter has ended (killed by signal 9): ")
