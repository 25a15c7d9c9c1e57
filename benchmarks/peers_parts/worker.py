"""One engine in a process of its own: its memory can be told, and its threads sleep while others run."""

from __future__ import annotations

import multiprocessing
import os
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
        # Threads that spin while another engine is measured would slow it.
        os.environ.update(OMP_NUM_THREADS=str(threads), OMP_WAIT_POLICY="PASSIVE", KMP_BLOCKTIME="0")
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, build, threads), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    @property
    def resident_bytes(self) -> int:
        """Of the process now, shared pages included."""
        status = Path(f"/proc/{self._process.pid}/status").read_text(encoding="ascii")
        line = next(line for line in status.splitlines() if line.startswith("VmRSS"))
        return int(line.split()[1]) * 1024

    def run(self, trial: Trial) -> Outcome:
        self._connection.send(trial)
        outcome = self._receive()
        assert isinstance(outcome, Outcome)
        return outcome

    def close(self) -> None:
        self._connection.close()
        self._process.join(timeout=5)
        self._process.kill()

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
