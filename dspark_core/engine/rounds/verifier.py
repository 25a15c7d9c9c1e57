"""The verifier: runs the round loop on its own thread and streams to asyncio callers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass

from dspark_core.engine.grammars import SequenceGrammar
from dspark_core.engine.rounds.loop import RoundLoop, RoundOutput
from dspark_core.errors import DSparkError, UnavailableError
from dspark_core.records import GenerateChunk, GenerateRequest

_log = logging.getLogger(__name__)

MAX_CONSECUTIVE_FAILURES = 6
"""After this many failed rounds in a row the verifier counts as unhealthy."""
STALL_SECONDS = 600.0
"""A longer round counts as hung, for example on a device or a lock that is never released. A large model on a
few cores takes minutes for a prefill chunk; after this long nobody waits for the answer any more."""
JOIN_SECONDS = 4.0
"""How long `stop` waits for a round to end; less than supervisors wait for a process to end."""


@dataclass(frozen=True, slots=True)
class VerifierStatus:
    running_requests: int
    waiting_requests: int
    """Includes requests that arrived during the current round and are not queued yet."""
    free_kv_fraction: float
    preemptions: int
    problem: str | None = None
    """Why no more rounds can be expected; None if all is well."""

    @property
    def healthy(self) -> bool:
        return self.problem is None


class _Stream:
    """Carries one request's chunks from the round thread to the caller's event loop.

    Chunks that the caller has not taken yet are joined into one. A caller that falls behind gets more tokens
    at a time instead of ever later ones, so an event loop shared by hundreds of streams catches up by itself.
    """

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.loop = asyncio.get_running_loop()
        self._chunks: list[GenerateChunk] = []
        self._error: Exception | None = None
        self._filled = asyncio.Event()

    def put(self, item: GenerateChunk | Exception) -> None:
        """Must run on the caller's event loop."""
        if isinstance(item, Exception):
            self._error = item
        else:
            self._chunks.append(item)
        self._filled.set()

    async def get(self) -> GenerateChunk:
        """Waits for new chunks and returns them joined; raises an error after the chunks before it."""
        await self._filled.wait()
        chunks, self._chunks = self._chunks, []
        if chunks:
            if self._error is None:
                self._filled.clear()
            return GenerateChunk.joined(chunks)
        if self._error is None:
            raise AssertionError("one caller at a time")
        raise self._error


def _put_all(items: Iterable[tuple[_Stream, GenerateChunk | Exception]]) -> None:
    """Callable from any thread. Wakes each event loop once, not once per stream of a round."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, GenerateChunk | Exception]]] = {}
    for stream, item in items:
        by_loop.setdefault(stream.loop, []).append((stream, item))
    for loop, put in by_loop.items():
        # If the event loop is closed, nobody is listening any more.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(_put_here, put)


def _put_here(items: Iterable[tuple[_Stream, GenerateChunk | Exception]]) -> None:
    for stream, item in items:
        stream.put(item)


class Verifier:
    def __init__(
        self,
        rounds: RoundLoop,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rounds = rounds
        self._streams: dict[str, _Stream] = {}
        self._arriving: set[_Stream] = set()
        self._commands: deque[Callable[[], None]] = deque()
        self._calls: set[Future[None]] = set()
        self._wake = threading.Condition()
        self._stopping = False
        self._failures = 0
        self._clock = clock
        self._round_began: float | None = None
        self._died: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the round thread; requests still running fail with UnavailableError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(JOIN_SECONDS)
            if self._thread.is_alive():
                _log.warning("a round still runs %g s after the stop; it is left behind", JOIN_SECONDS)

    @property
    def status(self) -> VerifierStatus:
        batcher = self._rounds.batcher
        return VerifierStatus(
            running_requests=len(batcher.running),
            waiting_requests=len(self._arriving) + len(batcher.waiting),
            free_kv_fraction=self._rounds.free_kv_fraction,
            preemptions=batcher.preemptions,
            problem=self._problem(),
        )

    def _problem(self) -> str | None:
        if self._stopping:
            return "stopping"
        if self._died is not None:
            return f"the thread of the rounds has died: {self._died!r}"
        if self._failures >= MAX_CONSECUTIVE_FAILURES:
            return f"the last {self._failures} rounds failed"
        began = self._round_began
        if began is not None and self._clock() - began > STALL_SECONDS:
            return f"a round has not ended for {self._clock() - began:.0f} s"
        return None

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[GenerateChunk, None]:
        """Streams one completion; closing the iterator cancels it and frees its pages.

        Raises what `RoundLoop.submit` raises, before the first chunk. A later attempt at a request that still
        runs here ends the earlier one, whose stream nobody may be reading any more, with UnavailableError.
        """
        stream = _Stream(request.attempt)
        finished = False
        grammar = None
        self._arriving.add(stream)
        try:
            if request.grammar is not None:  # not on the round thread: it could delay others' tokens
                grammar = await asyncio.wrap_future(self._rounds.compile_grammar(request, request.grammar))
            await asyncio.wrap_future(self._call(lambda: self._submit(request, grammar, stream)))
            while not finished:
                chunk = await stream.get()
                finished = chunk.finish_reason is not None
                yield chunk
        finally:
            self._arriving.discard(stream)
            if not finished:
                self._post(lambda: self._cancel(request.request_id, stream))

    def _submit(self, request: GenerateRequest, grammar: SequenceGrammar | None, stream: _Stream) -> None:
        earlier = self._streams.get(request.request_id)
        if earlier is not None and earlier.attempt < stream.attempt:
            self._fail([request.request_id], UnavailableError("the request was sent again"))
        self._rounds.submit(request, grammar)
        self._streams[request.request_id] = stream
        self._arriving.discard(stream)  # only now: from here on the batcher counts it

    def _cancel(self, request_id: str, stream: _Stream) -> None:
        # A new request may have taken the id since: cancel it only for its own stream.
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._rounds.cancel(request_id)

    def _call(self, action: Callable[[], None]) -> Future[None]:
        """Runs `action` between rounds; the future carries its outcome."""
        done: Future[None] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                action()
            except Exception as error:
                if not isinstance(error, DSparkError):
                    _log.exception("a request could not be taken in")
                done.set_exception(error)
            else:
                done.set_result(None)

        with self._wake:
            if self._stopping:
                raise UnavailableError("this verifier is stopping")
            if self._died is not None:
                raise UnavailableError("this verifier is broken")
            self._calls.add(done)
            self._commands.append(run)
            self._wake.notify()
        done.add_done_callback(self._calls.discard)
        return done

    def _post(self, action: Callable[[], None]) -> None:
        with self._wake:
            if self._died is None:  # otherwise nobody would run it
                self._commands.append(action)
                self._wake.notify()

    def _run(self) -> None:
        try:
            self._run_rounds()
        except Exception as error:
            # Otherwise callers would wait forever for a thread that is gone.
            _log.critical("the thread of the rounds has died", exc_info=error)
            with self._wake:
                self._died = error
                self._commands.clear()
            broken = UnavailableError("this verifier is broken")
            _put_all((stream, broken) for stream in self._streams.values())
            for call in tuple(self._calls):  # some may be completed meanwhile
                with contextlib.suppress(InvalidStateError):
                    call.set_exception(broken)
        else:
            self._fail(list(self._streams), UnavailableError("this verifier is stopping"))

    def _run_rounds(self) -> None:
        while self._wait_for_work():
            self._round_began = self._clock()
            try:
                outputs = self._rounds.step()
                self._failures = 0
            except Exception:
                self._failures += 1
                given_up = self._rounds.recover()
                _log.exception("a round failed; requests given up: %s", ", ".join(given_up) or "none")
                # Another verifier may be able to go on with them, from what was sent.
                self._fail(given_up, UnavailableError("rounds with this request failed"))
                continue
            finally:
                self._round_began = None
            self._deliver(outputs)

    def _wait_for_work(self) -> bool:
        """Runs pending commands, sleeping while there is nothing to do; returns False to stop."""
        while True:
            with self._wake:
                while not (self._commands or self._stopping or self._rounds.has_work):
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
            for command in commands:
                command()
            if self._stopping:
                return False
            if self._rounds.has_work:
                return True

    def _deliver(self, outputs: list[RoundOutput]) -> None:
        deliveries: list[tuple[_Stream, GenerateChunk | Exception]] = []
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if output.chunk.finish_reason is not None or output.error is not None:
                self._streams.pop(output.request_id, None)
            if stream is not None:
                deliveries.append((stream, output.error or output.chunk))
        _put_all(deliveries)

    def _fail(self, request_ids: Iterable[str], error: Exception) -> None:
        failed = []
        for request_id in request_ids:
            self._rounds.cancel(request_id)
            if stream := self._streams.pop(request_id, None):
                failed.append((stream, error))
        _put_all(failed)
