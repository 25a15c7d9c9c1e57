"""One engine in a process of its own: its memory can be told, and it is stopped while others run."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from benchmarks.peers_parts.contract import Outcome, Peer, Trial

Build = Callable[[], Peer]


class PeerFailedError(Exception):
    """An engine that could not be built or run; the message is its own."""


class PeerProcess:
    def __init__(self, build: Build, threads: int) -> None:
        """`build` is called in the new process and must be picklable. Raises PeerFailedError."""
        os.environ["OMP_NUM_THREADS"] = str(threads)
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, threads), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()
        self._pause()

    @property
    def resident_bytes(self) -> int:
        """Of the process now, shared pages included."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    def run(self, trial: Trial) -> Outcome:
        self._signal(signal.SIGCONT)
        self._connection.send(trial)
        outcome = self._receive()
        self._pause()
        assert isinstance(outcome, Outcome)
        return outcome

    def close(self) -> None:
        self._signal(signal.SIGCONT)
        self._connection.close()
        self._process.join(timeout=5)
        self._process.kill()

    def _pause(self) -> None:
        """Stops it: threads that spin while they wait for work would slow the engine measured next."""
        self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
        if self._process.pid is not None and self._process.is_alive():
            os.kill(self._process.pid, number)

    def _receive(self) -> object:
        try:
            answer = self._connection.recv()
        except EOFError:
            raise PeerFailedError(f"ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise PeerFailedError(answer)
        return answer


def _serve(connection: Connection, build: Build, threads: int) -> None:
    try:
        import torch

        torch.set_num_threads(threads)
        peer = build()
        connection.send(None)
        while True:
            connection.send(peer.run(connection.recv()))
    except EOFError:
        return
    except Exception as error:  # told to the parent, which goes on without this engine
        connection.send(f"{type(error).__name__}: {error}")
