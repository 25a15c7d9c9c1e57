"""Real locust runs over real HTTP against a fake gateway."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from tests.support.polling import eventually
from tests.support.ports import free_ports
from tests.unit.loadtest.fake_gateway import serving

LOCUSTFILE = Path(__file__).resolve().parents[3] / "loadtest" / "locustfile.py"


SLOW_WORKERS = """
import time
from locust import events
from locust.runners import WorkerRunner

@events.test_stop.add_listener
def hesitate(environment, **_):
    if isinstance(environment.runner, WorkerRunner):
        time.sleep(1.5)
"""
"""Another locustfile: workers report later than locust's master waits for, as on a busy machine."""


def start_locust(
    host: str,
    folder: Path,
    *flags: str,
    files: tuple[Path, ...] = (LOCUSTFILE,),
    stderr: int = subprocess.STDOUT,
) -> subprocess.Popen[str]:
    """Runs from another folder: the file must find its own modules."""
    usual = ["-u", "2", "-r", "2", "--report-json", "report.json"]
    usual += [] if "--web-port" in flags else ["--headless", "-t", "30s"]
    # The default port may be another test's, or still that of the run before.
    port = str(free_ports(1)[0])
    usual += ["--master-bind-port", port, "--master-port", port]
    return subprocess.Popen(
        [sys.executable, "-m", "locust", "-f", ",".join(map(str, files)), "--host", host, *usual, *flags],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


def finished(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    with process:
        try:
            printed, _ = process.communicate(timeout=120)
        finally:
            process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, printed)


def locust(host: str, folder: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return finished(start_locust(host, folder, *flags))


def test_a_kept_promise_exits_zero_and_reports_what_users_saw(tmp_path):
    with serving(pause_seconds=0.02) as gateway:
        done = locust(gateway.url, tmp_path, "--requests", "6", "--min-tokens-per-second", "1")
    assert done.returncode == 0, done.stdout
    assert "promise KEPT: 6 of 6 chats" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["chats"], report["failed"], report["refused"]) == (6, 0, 0)
    assert report["accepted_length"] == {"mean": 2.5}
    assert report["total_tokens_per_second"] == pytest.approx(66 / report["seconds"], rel=0.01)
    assert report["tokens_per_second"]["p50"] > 1
    for row in ("time to first token [ms]", "tokens/s per user", "accepted length x100"):
        assert row in done.stdout


def test_json_on_standard_output_stands_alone(tmp_path):
    with serving() as gateway:
        flags = ("--json", "--requests", "2")
        process = start_locust(gateway.url, tmp_path, *flags, stderr=subprocess.DEVNULL)
        done = finished(process)
    assert done.returncode == 0, done.stdout
    assert "/v1/chat/completions" in {row["name"] for row in json.loads(done.stdout)}


def test_chats_are_asked_for_as_documented(tmp_path):
    with serving() as gateway:
        flags = (
            "--requests",
            "2",
            "--max-tokens",
            "9",
            "--speculation",
            "off",
            "--temperature",
            "0.5",
            "--ignore-eos",
        )
        assert locust(gateway.url, tmp_path, *flags).returncode == 0
        first, second = gateway.bodies
    assert first.pop("messages") != second.pop("messages")
    assert first == {
        "model": "tiny-model",
        "max_tokens": 9,
        "temperature": 0.5,
        "stream": True,
        "stream_options": {"include_usage": True},
        "speculation": {"enabled": False},
        "ignore_eos": True,
    }


@pytest.mark.parametrize(
    ("behaviour", "flags", "counted", "printed"),
    [
        ("answer", ("--min-tokens-per-second", "1e6"), "chats", "promise BROKEN: 0 of 2 chats"),
        ("answer", ("--max-first-token-ms", "0.001"), "chats", "0 of 2 chats (0.0%) reached a first token"),
        ("cut", ("--min-tokens-per-second", "1"), "failed", "without [DONE]"),
        ("refuse", (), "failed", "HTTP 400"),
        ("odd", (), "failed", "the answer cannot be read: AttributeError"),
        ("bytes", (), "failed", "the answer cannot be read: UnicodeDecodeError"),
        ("busy", ("--min-tokens-per-second", "1"), "refused", "no chat could be judged"),
    ],
)
def test_what_breaks_the_promise_exits_one_and_is_counted(tmp_path, behaviour, flags, counted, printed):
    with serving(behaviour) as gateway:
        done = locust(gateway.url, tmp_path, "--requests", "2", *flags)
    assert done.returncode == 1, done.stdout
    assert printed in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert {name: report[name] for name in ("chats", "failed", "refused") if report[name]} == {counted: 2}


@pytest.mark.parametrize("flags", [(), ("--processes", "2")], ids=["alone", "workers"])
def test_chats_that_hang_until_the_end_break_the_promise(tmp_path, flags):
    with serving("stall") as gateway:
        done = locust(gateway.url, tmp_path, "-t", "3s", "--min-tokens-per-second", "20", *flags)
    assert done.returncode == 1, done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert (report["chats"], report["unfinished"], report["failed"]) == (1, 2, 0)
    assert report["seconds"] == pytest.approx(3, abs=2)
    assert "1 of 3 chats" in done.stdout
    assert "already broken when cut off: 2" in done.stdout


@pytest.mark.parametrize("flags", [(), ("--processes", "2")], ids=["alone", "workers"])
async def test_chats_that_a_signal_cuts_off_are_judged(tmp_path, flags):
    with (
        serving("stall") as gateway,
        start_locust(gateway.url, tmp_path, "--max-first-token-ms", "0.001", *flags) as process,
    ):
        await eventually(lambda: len(gateway.bodies) >= 3, within_seconds=30)
        process.terminate()
        done = finished(process)
    assert done.returncode == 1, done.stdout
    assert "already broken when cut off: 2" in done.stdout


async def test_slow_worker_processes_report_to_one_verdict(tmp_path):
    slow = tmp_path / "slow.py"
    slow.write_text(SLOW_WORKERS)
    flags = ("--processes", "2", "--min-tokens-per-second", "1")
    with (
        serving() as gateway,
        start_locust(gateway.url, tmp_path, *flags, files=(LOCUSTFILE, slow)) as process,
    ):
        await eventually(lambda: len(gateway.bodies) >= 6, within_seconds=30)
        process.terminate()
        done = finished(process)
        asked = len(gateway.bodies)
    assert done.returncode == 0, done.stdout
    chats = json.loads((tmp_path / "report.json").read_text())["chats"]
    assert asked - 2 <= chats <= asked  # one of each user may be cut off


@pytest.mark.parametrize("flags", [(), ("--processes", "2")], ids=["alone", "workers"])
async def test_each_run_of_the_web_interface_has_its_own_report(tmp_path, flags):
    web_port = free_ports(1)[0]
    address = ("--web-host", "127.0.0.1", "--web-port", str(web_port))
    report = tmp_path / "report.json"

    def ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            workers = web.get("/stats/requests").json().get("workers", ())
            return [worker["state"] for worker in workers] == ["ready"] * (2 if flags else 0)
        return False

    async def run() -> tuple[dict[str, object], int]:
        """One run's report, and how many chats were asked for in it."""
        before = len(gateway.bodies)

        await eventually(ready, within_seconds=30)
        web.post("/swarm", data={"user_count": "2", "spawn_rate": "2"})
        await eventually(lambda: len(gateway.bodies) >= before + 6, within_seconds=30)
        web.post("/stop")
        await eventually(report.exists, within_seconds=30)
        told = json.loads(report.read_text())
        report.unlink()
        return told, len(gateway.bodies) - before

    with (
        serving() as gateway,
        httpx.Client(base_url=f"http://127.0.0.1:{web_port}", timeout=30) as web,
        start_locust(gateway.url, tmp_path, "--min-tokens-per-second", "1", *address, *flags) as process,
    ):
        try:
            runs = [await run(), await run()]
        finally:
            process.terminate()
            done = finished(process)
    assert done.returncode == 0, done.stdout
    assert done.stdout.count("promise KEPT") == 2, done.stdout
    for told, asked in runs:
        assert asked - 2 <= told["chats"] <= asked  # one of each user may be cut off
        assert told["verdict"]["kept"]


def test_a_count_of_chats_is_refused_with_worker_processes(tmp_path):
    with serving() as gateway:
        done = locust(gateway.url, tmp_path, "--processes", "2", "--requests", "3")
        assert not gateway.bodies
    assert done.returncode != 0
    assert "--requests counts the chats of one process: give -t instead" in done.stdout


@pytest.mark.parametrize("flags", [(), ("--processes", "2")], ids=["alone", "workers"])
def test_a_gateway_that_asks_for_a_key_ends_the_run_with_one_line(tmp_path, flags):
    with serving("keys") as gateway:
        done = locust(gateway.url, tmp_path, *flags)
    assert done.returncode == 1, done.stdout
    assert done.stdout.count("HTTP 401: missing API key; give --api-key") == 1, done.stdout
    assert "Traceback" not in done.stdout


def test_a_gateway_without_a_model_ends_the_run_with_one_line(tmp_path):
    with serving("no models") as gateway:
        done = locust(gateway.url, tmp_path)
    assert done.returncode == 1, done.stdout
    assert done.stdout.count('the gateway names no model: {"data": []}') == 1, done.stdout
    assert "Traceback" not in done.stdout


def test_a_gateway_that_is_not_there_ends_the_run_with_one_line(tmp_path):
    done = locust("http://127.0.0.1:9", tmp_path)
    assert done.returncode == 1, done.stdout
    assert done.stdout.count("the gateway cannot be asked for its models: ") == 1
    assert "Traceback" not in done.stdout


def test_a_report_that_finds_no_room_keeps_what_was_printed(tmp_path):
    with serving() as gateway:
        done = locust(gateway.url, tmp_path, "--requests", "2", "--report-json", "/dev/full")
    assert done.returncode == 1, done.stdout
    assert "the report cannot be written: [Errno 28] No space left on device" in done.stdout
    assert "Traceback" not in done.stdout


def test_a_senseless_option_is_refused_by_name(tmp_path):
    done = locust("http://127.0.0.1:9", tmp_path, "--promise-share", "1.5")
    assert done.returncode != 0
    assert "--promise-share: must be in (0, 1], got 1.5" in done.stdout
