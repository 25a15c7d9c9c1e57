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

from dspark_core.errors import ConfigError
from services.common.exits import EXIT_CONFIG, EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_TERMINATED
from services.common.logs import setup_logging

STACKS_SIGNAL = signal.SIGUSR1
"""A service that receives it prints the Python stacks of its threads to stderr and continues."""

OPEN_FILES = 65_536

PARENT = "_DSPARK_PARENT_PID"
"""Environment variable with the id of the starting process, for a service that is to end with it."""
_PR_SET_PDEATHSIG = 1

Run = Callable[[Mapping[str, str]], Coroutine[None, None, None]]


def run_process(service: str, run: Run, environ: Mapping[str, str] = os.environ) -> NoReturn:
    """Runs a service to its end and exits the process: 0 after a drain, 2 for a bad configuration (one
    line, no traceback), 1 with a traceback for any other exception.

    What takes long to import, and gRPC, is for `run` to import: until then the first process of a container
    cannot be stopped, and gRPC reads its settings when it is imported.

    It skips the interpreter's own teardown. By then everything is closed, flushed and sent; only gRPC's and
    torch's threads remain, and waiting for those can hang (grpc/grpc#22365).
    """
    end_when_terminated()
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # it writes to stderr as it likes, not as our log does
    print_stacks_when_asked()
    allow_open_files()
    if PARENT in environ:
        end_with_parent(int(environ[PARENT]))
    code = _run(service, run, environ)
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # its reader is gone
            stream.flush()
    os._exit(code)


def end_when_terminated() -> None:
    """Has SIGTERM end the process until `stop_signals` takes it over.

    By default it does, but Linux discards signals that the first process of a container does not handle:
    a service told to stop while it loads would become ready, and be killed with the requests it took.
    """
    if os.getpid() == 1:
        signal.signal(signal.SIGTERM, lambda *_: os._exit(EXIT_TERMINATED))


def print_stacks_when_asked() -> None:
    """On STACKS_SIGNAL, prints the main thread's stack at once, wherever it hangs, and the stacks of all
    threads when it next runs Python.

    Stacks of threads that are running Python cannot be read at once: a frame that is freed meanwhile crashes
    the process with a segmentation fault.
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
    """Has this process sent SIGTERM when its parent ends: an orphan would keep its ports and memory.

    The child calls this itself: between fork and exec (`preexec_fn`), with gRPC's threads running in the
    parent, it occasionally crashed the child.
    """
    if sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:  # it ended before prctl took effect
        os.kill(os.getpid(), signal.SIGTERM)


def _run(service: str, run: Run, environ: Mapping[str, str]) -> int:
    async def main() -> None:
        import grpc.aio

        # gRPC counts the users of its poller and joins its thread when none are left: hold one while we run.
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
