"""Compiles the kernels for the local processor and caches the result.

Needs only a C++17 compiler, for a few seconds, once: the library is cached under a key of sources,
compiler and processor. Without a compiler nothing fails; callers get the reason and fall back to
PyTorch's own operators.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

_log = logging.getLogger(__name__)

SOURCES = Path(__file__).with_name("csrc")
FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared", "-pthread", "-w")
NATIVE_FLAGS = (("-march=native",), ("-mcpu=native",), ())
"""Tried in this order: the x86 and the Arm flag for the local processor, then none."""
COMPILE_TIMEOUT_SECONDS = 400.0
"""Compilation usually takes seconds; zig builds its C++ library first, which takes minutes under load."""


class KernelsUnavailableError(Exception):
    """Why native kernels are unavailable here; the message is suitable for users."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BuildSettings:
    """Where and with which compiler to build."""

    cache_directory: Path
    compiler: tuple[str, ...]

    @classmethod
    def from_env(cls, environ: Mapping[str, str]) -> BuildSettings:
        """`DSPARK_CACHE_DIR` or the user's cache; `CXX` or the first compiler found.

        Raises KernelsUnavailableError without a compiler or a safe directory, or with `DSPARK_KERNELS=off`.
        """
        if environ.get("DSPARK_KERNELS") == "off":
            raise KernelsUnavailableError("switched off by DSPARK_KERNELS=off")
        return cls(cache_directory=_cache_directory(environ), compiler=_find_compiler(environ))


def build_library(settings: BuildSettings) -> Path:
    """The compiled library, from the cache if present.

    Raises KernelsUnavailableError if it cannot be compiled; never leaves a partial file.
    """
    target = settings.cache_directory / f"kernels-{_key(settings)}.so"
    if target.is_file():
        return target
    try:
        settings.cache_directory.mkdir(parents=True, exist_ok=True)
        with _locked(settings.cache_directory / "kernels.lock"):
            if not target.is_file():  # another process may have built it meanwhile
                _compile(settings, target)
    except OSError as error:
        raise KernelsUnavailableError(f"cannot write to {settings.cache_directory}: {error}") from error
    return target


def _compile(settings: BuildSettings, target: Path) -> None:
    started = time.monotonic()
    _log.info("compiling native kernels with %s (once, some seconds)", " ".join(settings.compiler))
    failures = []
    with tempfile.TemporaryDirectory(dir=settings.cache_directory) as scratch:
        output = Path(scratch) / "kernels.so"
        for native in NATIVE_FLAGS:
            failure = compile_library(settings.compiler, native, output)
            if failure is None:
                output.replace(target)
                _log.info("native kernels compiled in %.1f s: %s", time.monotonic() - started, target)
                return
            failures.append(failure)
    raise KernelsUnavailableError(f"{' '.join(settings.compiler)} failed: {failures[0]}")


def compile_library(compiler: tuple[str, ...], arguments: tuple[str, ...], output: Path) -> str | None:
    """Compiles for the processor given by `arguments`. Returns the error, or None on success."""
    command = [*compiler, *FLAGS, *arguments, str(SOURCES / "kernels.cpp"), "-o", str(output)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    errors = [line for line in lines if "error" in line]
    return (errors or lines or [f"exit status {done.returncode}"])[0]


def _find_compiler(environ: Mapping[str, str]) -> tuple[str, ...]:
    named = environ.get("CXX", "").split()
    if named:
        return tuple(named)
    for name in ("c++", "g++", "clang++"):
        found = shutil.which(name)
        if found:
            return (found,)
    if importlib.util.find_spec("ziglang"):  # a compiler that pip can install
        return (sys.executable, "-m", "ziglang", "c++")
    raise KernelsUnavailableError("no C++ compiler; install g++ or clang++, or pip install ziglang (400 MB)")


def _cache_directory(environ: Mapping[str, str]) -> Path:
    if environ.get("DSPARK_CACHE_DIR"):
        return Path(environ["DSPARK_CACHE_DIR"])
    if environ.get("XDG_CACHE_HOME"):
        return Path(environ["XDG_CACHE_HOME"]) / "dspark"
    if environ.get("HOME"):
        return Path(environ["HOME"]) / ".cache" / "dspark"
    return _own_temporary_directory()


def _own_temporary_directory() -> Path:
    """Raises KernelsUnavailableError unless it is this user's alone.

    Others may write to the directory above and know this name; libraries they put there must not be loaded.
    """
    path = Path(tempfile.gettempdir()) / f"dspark-{os.geteuid()}"
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        found = path.lstat()  # a link could be turned elsewhere after this
    except OSError as error:
        raise KernelsUnavailableError(f"HOME is not set, and {path} cannot be used: {error}") from error
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise KernelsUnavailableError(
            f"HOME is not set, and {path} is not a directory of this user alone (mode 0700); "
            "set DSPARK_CACHE_DIR"
        )
    return path


def _key(settings: BuildSettings) -> str:
    digest = hashlib.sha256()
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + source.read_bytes())
    version = _run_for_output([*settings.compiler, "--version"])
    digest.update(repr((settings.compiler, version, FLAGS, platform.machine(), _processor())).encode())
    return digest.hexdigest()[:16]


def _run_for_output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise KernelsUnavailableError(f"{command[0]} cannot be run: {error}") from error


def processor_flags() -> frozenset[str]:
    """The processor's feature flags by their Linux names; empty if unknown."""
    name, _, flags = _processor().partition(":")
    return frozenset(flags.split()) if name.strip() in ("flags", "Features") else frozenset()


def _processor() -> str:
    """The processor's feature line: a library compiled for another processor might not run here."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return line
    except OSError:
        pass
    return platform.processor()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Serialises compilation across processes; the compiler timeout bounds the wait."""
    import fcntl  # POSIX only, as is everything else here

    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def default_settings() -> BuildSettings:
    """Settings from this process's environment. Raises KernelsUnavailableError."""
    if os.name != "posix":
        raise KernelsUnavailableError(f"not supported on {platform.system()}")
    return BuildSettings.from_env(os.environ)
