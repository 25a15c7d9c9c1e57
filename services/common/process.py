"""How a service process starts and ends: logging, the event loop, exit codes."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import faulthandler
import logging
import os
import resource
import signal
import sys
import traceback
from collections.abc import Callable, Coroutine, Mapping
from typing import NoReturn

import grpc.aio

from dspark_core.errors import ConfigError
from services.common.exits import EXIT_CONFIG, EXIT_FAILURE, EXIT_INTERRUPTED
from services.common.logs import setup_logging

STACKS_SIGNAL = signal.SIGUSR1
"""A service that gets it prints the Python stacks of its threads to stderr and goes on."""

OPEN_FILES = 65_536

PARENT = "_DSPARK_PARENT_PID"
"""Set for a service that shall end with the process that started it, to that one's id."""
_PR_SET_PDEATHSIG = 1

Run = Callable[[Mapping[str, str]], Coroutine[None, None, None]]


def run_process(service: str, run: Run, environ: Mapping[str, str] = os.environ) -> NoReturn:
    """Runs a service to its end and leaves the process: 0 after a drain, 2 for a bad configuration (one
    line, no traceback), 1 with a traceback for anything else that is raised.

    It leaves without the interpreter's own teardown. By then all is closed, flushed and sent; what is
    left to destroy are gRPC's and torch's threads, and waiting for those can hang (grpc/grpc#22365).
    """
    print_stacks_when_asked()
    allow_open_files()
    if PARENT in environ:
        end_with_parent(int(environ[PARENT]))
    code = _run(service, run, environ)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # whoever read it has gone
            stream.flush()
    os._exit(code)


def print_stacks_when_asked() -> None:
    """The main thread's stack at once, wherever it hangs; those of all when it next runs Python.

    While others run Python their stacks cannot be read: frames that are freed meanwhile end the process with
    a segmentation fault.
    """
    signal.signal(STACKS_SIGNAL, lambda *_: faulthandler.dump_traceback())
    faulthandler.register(STACKS_SIGNAL, all_threads=False, chain=True)


def allow_open_files() -> None:
    """Systems give a process 1,024 at first and let it ask for more. A gateway takes on more requests than
    that, each over a connection of its own."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    asked = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < asked:
        with contextlib.suppress(OSError, ValueError):  # some systems have a lower limit of another name
            resource.setrlimit(resource.RLIMIT_NOFILE, (asked, hard))


def end_with_parent(parent_pid: int) -> None:
    """SIGTERM to this process when that one ends: an orphan would go on holding its ports and its memory.

    Asked for by the child: run by the parent between fork and exec, while threads of gRPC's were about, it
    crashed the child now and then.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it ended before this was asked
        os.kill(os.getpid(), signal.SIGTERM)


def _run(service: str, run: Run, environ: Mapping[str, str]) -> int:
    async def main() -> None:
        # gRPC counts who uses its poller and, at none, waits for its thread: never while we run.
        grpc.aio.init_grpc_aio()
        await run(environ)

    try:
        setup_logging(service, environ)
        asyncio.run(main())
    except ConfigError as error:
        if not logging.getLogger().handlers:
            print(f"{service}: {error}", file=sys.stderr)
        else:
            logging.getLogger(service).error("%s", error)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED
    except Exception:
        traceback.print_exc()
        return EXIT_FAILURE
    return 0
