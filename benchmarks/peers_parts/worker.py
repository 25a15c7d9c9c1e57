"""Runs one engine in its own process, so that its memory can be measured and it can be paused."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.peers_parts.contract import Outcome, Peer, Trial

Build = Callable[[], Peer]
ROOT = Path(__file__).parents[2]


class PeerFailedError(Exception):
    """An engine could not be built or run; the message is the engine's."""


class PeerProcess:
    def __init__(self, build: Build, threads: int, python: Path | None = None) -> None:
        """`build` is called in the new process and must be picklable. Raises PeerFailedError.

        `python`: interpreter of another environment, for engines that need other versions of our
        dependencies; it must be able to import this package.
        """
        self._connection, theirs = multiprocessing.Pipe()
        try:
            self._process = subprocess.Popen(
                [str(python or sys.executable), "-m", __name__, str(theirs.fileno()), str(threads)],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)},
            )
        except OSError as error:
            self._connection.close()
            raise PeerFailedError(str(error)) from error
        finally:
            theirs.close()
        try:
            self._send(build)
            self._receive()
        except PeerFailedError:
            self.close()
            raise
        self._pause()

    @property
    def resident_bytes(self) -> int:
        """Current resident memory of the process, shared pages included."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    def run(self, trial: Trial) -> Outcome:
        self._signal(signal.SIGCONT)
        self._send(trial)
        outcome = self._receive()
        self._pause()
        assert isinstance(outcome, Outcome)
        return outcome

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._connection.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _pause(self) -> None:
        """Stop the process, because threads that spin while idle would slow the next engine measured."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            self._process.send_signal(number)

    def _send(self, message: object) -> None:
        try:
            self._connection.send(message)
        except OSError:
            raise self._ended() from None

    def _ended(self) -> PeerFailedError:
        return PeerFailedError(f"ended with exit code {self._process.wait()}")

    def _receive(self) -> object:
        try:
            answer = self._connection.recv()
        except (EOFError, OSError):
            raise self._ended() from None
        if isinstance(answer, str):
            raise PeerFailedError(answer)
        return answer


def _serve(connection: Connection, threads: int) -> None:
    try:
        build = connection.recv()
        import torch

        torch.set_num_threads(threads)
        peer = build()
        connection.send(None)
        while True:
            connection.send(peer.run(connection.recv()))
    except EOFError:
        return
    except Exception as error:  # reported to the parent, which continues without this engine
        connection.send(f"{type(error).__name__}: {error}")


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])), int(sys.argv[2]))
