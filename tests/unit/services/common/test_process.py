"""How a service process ends: its exit code, what it says, and that nothing can hold it up."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

SCRIPT = """
import asyncio, threading
from dspark_core.errors import ConfigError
from services.common.process import run_process

async def run(environ):
    {body}

run_process("verifier", run, {{}})
"""


def script(body: str) -> list[str]:
    return [sys.executable, "-c", SCRIPT.format(body=body)]


def ended(body: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(script(body), capture_output=True, text=True, timeout=60)


def test_a_thread_that_never_ends_does_not_hold_up_the_exit() -> None:
    result = ended('threading.Thread(target=threading.Event().wait).start(); print("last words", end="")')
    assert (result.returncode, result.stdout) == (0, "last words")


def test_a_bad_configuration_is_one_line_and_code_2() -> None:
    result = ended('raise ConfigError("DSPARK_PORT must be in [0, 65535], got 70000")')
    assert result.returncode == 2
    assert "DSPARK_PORT must be in [0, 65535], got 70000" in result.stderr
    assert "Traceback" not in result.stderr


def test_anything_else_is_a_traceback_and_code_1() -> None:
    result = ended('raise RuntimeError("surprise")')
    assert result.returncode == 1
    assert "Traceback" in result.stderr
    assert "RuntimeError: surprise" in result.stderr


@pytest.fixture
def hanging() -> Iterator[subprocess.Popen[str]]:
    body = 'print("here", flush=True); await asyncio.Event().wait()'
    process = subprocess.Popen(script(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process
    process.kill()
    process.communicate()


def test_a_process_that_hangs_tells_where(hanging: subprocess.Popen[str]) -> None:
    assert hanging.stdout
    assert hanging.stderr
    assert hanging.stdout.readline() == "here\n"
    hanging.send_signal(signal.SIGUSR1)
    lines = iter(hanging.stderr.readline, "")
    assert any("run_until_complete" in line for line in lines)
    assert hanging.poll() is None


CHILD = """
import asyncio, os
from services.common.process import PARENT, run_process

async def run(environ):
    print(os.getpid(), flush=True)
    await asyncio.Event().wait()

run_process("verifier", run, {PARENT: os.environ["EXPECTED_PARENT"]})
"""
MIDDLE = """
import os, subprocess, sys
expected = sys.argv[2] or str(os.getpid())
subprocess.run([sys.executable, "-c", sys.argv[1]], env={**os.environ, "EXPECTED_PARENT": expected})
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent ended")
def test_a_service_ends_with_the_process_that_started_it() -> None:
    command = [sys.executable, "-c", MIDDLE, CHILD, ""]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as middle:
        assert middle.stdout
        assert middle.stdout.readline()  # the child runs
        middle.kill()
        # The pipe ends when nobody holds it any more: neither the one that was killed nor its child.
        assert middle.stdout.read() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent ended")
def test_a_service_whose_parent_ended_before_it_could_ask_ends_at_once() -> None:
    another = str(os.getpid())  # is not what starts it
    result = subprocess.run(
        [sys.executable, "-c", MIDDLE, CHILD, another], capture_output=True, text=True, timeout=60
    )
    assert result.stdout == ""
