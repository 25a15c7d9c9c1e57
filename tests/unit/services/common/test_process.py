"""How a service process ends: its exit code, what it says, and that nothing can hold it up."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
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
    return subprocess.run(script(body), capture_output=True, text=True, timeout=120)


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


def test_a_process_asks_for_the_open_files_it_may_have() -> None:
    body = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    limited = ["bash", "-c", 'ulimit -Sn 500 && ulimit -Hn 4000 && exec "$@"', "bash", *script(body)]
    assert subprocess.run(limited, capture_output=True, text=True, timeout=120).stdout == "4000\n"


@pytest.mark.parametrize(("given", "told"), [({}, "ERROR"), ({"GRPC_VERBOSITY": "INFO"}, "INFO")])
def test_grpc_writes_errors_alone_unless_it_is_told_otherwise(given: dict[str, str], told: str) -> None:
    """In a form of its own, amid the lines of our log; and it reads this when it is imported."""
    body = 'import os; print(os.environ["GRPC_VERBOSITY"])'
    before = {name: value for name, value in os.environ.items() if name != "GRPC_VERBOSITY"}
    result = subprocess.run(
        script(body), env={**before, **given}, capture_output=True, text=True, timeout=120
    )
    assert result.stdout == f"{told}\n"


@contextlib.contextmanager
def running(body: str) -> Iterator[subprocess.Popen[str]]:
    """Once it has said that it is here."""
    process = subprocess.Popen(script(body), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    limit = threading.Timer(120, process.kill)  # or what is waited for in vain is waited for for ever
    limit.start()
    try:
        assert process.stdout
        assert process.stdout.readline() == "here\n"
        yield process
    finally:
        limit.cancel()
        process.kill()
        process.communicate()


def wait_for_stacks(process: subprocess.Popen[str]) -> None:
    assert process.stderr
    assert any("run_until_complete" in line for line in iter(process.stderr.readline, ""))


def test_a_process_that_hangs_tells_where() -> None:
    with running('print("here", flush=True); await asyncio.Event().wait()') as hanging:
        hanging.send_signal(signal.SIGUSR1)
        wait_for_stacks(hanging)
        assert hanging.poll() is None


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere another thread may get the signal")
def test_a_main_thread_that_runs_no_python_tells_where_too() -> None:
    sleep = "import ctypes; print('here', flush=True); ctypes.PyDLL(None).sleep(60)"  # and keeps the GIL
    with running(sleep) as hanging:
        hanging.send_signal(signal.SIGUSR1)
        wait_for_stacks(hanging)


def first_of_a_container(body: str) -> list[str]:
    return ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", *script(body)]


def may_start_containers() -> bool:
    try:
        return subprocess.run(first_of_a_container("pass"), capture_output=True, timeout=120).returncode == 0
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(
    "loading",
    [
        "stop_soon(); await asyncio.to_thread(time.sleep, 60)",
        "stop_soon(); time.sleep(60)",
        "import torch; a = torch.ones(2000, 2000); stop_soon(); "
        "await asyncio.to_thread(lambda: [a @ a for _ in range(10000)])",
    ],
    ids=["asleep", "in the main thread", "computing"],
)
def test_a_stop_that_comes_before_a_container_serves_ends_it(loading: str) -> None:
    """Linux discards what the first process of a container does not handle."""
    if not may_start_containers():
        pytest.skip("no process namespaces here")
    stop = "import os, signal, time; stop_soon = threading.Timer(0.5, os.kill, (1, signal.SIGTERM)).start; "
    command = first_of_a_container(stop + loading)
    assert subprocess.run(command, capture_output=True, timeout=120).returncode == 143


BUSY = """
    import random, sys
    sys.setswitchinterval(1e-4)
    def deep(n): return n if n == 0 else deep(n - 1) + 1
    def work():
        while True:
            deep(random.randrange(400))
            exec("def once(n): return n if n == 0 else once(n - 1) + 1\\nonce(60)", {{}})
    for _ in range(2): threading.Thread(target=work, daemon=True).start()
    print("here", flush=True)
    while True:
        await asyncio.sleep(0.001)
        deep(50)
"""


def test_a_process_whose_threads_are_busy_survives_telling_where() -> None:
    with running(BUSY.strip().format()) as busy:
        for _ in range(200):
            busy.send_signal(signal.SIGUSR1)
            wait_for_stacks(busy)
        assert busy.poll() is None


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
        [sys.executable, "-c", MIDDLE, CHILD, another], capture_output=True, text=True, timeout=120
    )
    assert result.stdout == ""
