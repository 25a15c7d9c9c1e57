"""Whether a grammar can be parsed, found out in processes of their own.

Some small grammars keep llguidance busy for a minute (twenty patterns that have to hold at once) or for hours
(each further one about doubles that), with memory that grows, and what a thread runs cannot be stopped. So
each grammar is parsed in a process that ends itself when its time is over. A short time comes first, and what
it is too short for is tried again with the whole time in another queue, so that ordinary grammars do not wait
for it. In each queue owners take turns.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any

from dspark_core.errors import InvalidRequestError, QueueFullError
from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.tokenization.deep_threads import deep_thread
from dspark_core.tokenization.grammar_sources import problem_of
from dspark_core.tokenization.turns import TurnQueue

CHECK_SECONDS = 1.0
"""Of a processor's time for one grammar; large ones that are meant take a tenth of it."""
FIRST_SECONDS = 0.1
"""Of a processor's time at the first try."""
WAIT_SECONDS = 10.0
"""In a queue; a grammar whose turn comes later is refused."""
HANG_SECONDS = 30.0
"""Of any time, on a machine that hardly gives the process a processor."""
_TIMED_OUT = (signal.SIGPROF, signal.SIGALRM)


class GrammarChecker:
    """Threads may share it. Its processes start when first needed and end with it."""

    def __init__(
        self, check_seconds: float = CHECK_SECONDS, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._check_seconds = check_seconds
        self._clock = clock
        self._first, self._second = _Queue("grammar-check"), _Queue("grammar-check-slow")

    def check(self, grammar: Grammar, field: str, owner: str = "") -> Future[None]:
        """Fails with InvalidRequestError that names `field`, for what is no grammar with any tokenizer, or
        takes too long to find out; with QueueFullError if too many others are being checked. Can be cancelled
        until its first try begins. owner: who asks."""
        checked: Future[None] = Future()
        seconds = min(FIRST_SECONDS, self._check_seconds)
        one = _Check(checked, grammar, field, owner)
        self._first.turns.submit(owner, partial(self._try, one, seconds, self._clock()))
        return checked

    def _try(self, one: _Check, seconds: float, asked_at: float) -> None:
        checked, field = one.checked, one.field
        again = checked.running()
        if not again and not checked.set_running_or_notify_cancel():
            return
        try:
            if self._clock() - asked_at > WAIT_SECONDS:
                raise QueueFullError(
                    f"{field}: more grammars are being checked than {WAIT_SECONDS:g} s are enough for"
                )
            timed_out, problem = (self._second if again else self._first).problem_of(one.grammar, seconds)
            if timed_out and not again and seconds < self._check_seconds:
                self._second.turns.submit(
                    one.owner, partial(self._try, one, self._check_seconds, self._clock())
                )
                return
            if problem is not None:
                raise InvalidRequestError(f"{field}: {problem}", field=field)
        except Exception as error:
            checked.set_exception(error)
        else:
            checked.set_result(None)


@dataclass(frozen=True, slots=True)
class _Check:
    checked: Future[None]
    grammar: Grammar
    field: str
    owner: str


class _Queue:
    """One grammar at a time, in a process that lasts."""

    def __init__(self, name: str) -> None:
        self.turns = TurnQueue(name)
        self._process: subprocess.Popen[bytes] | None = None

    def problem_of(self, grammar: Grammar, seconds: float) -> tuple[bool, str | None]:
        """Only for what was submitted -> whether the seconds were too few, what is wrong with the grammar."""
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        if process.stdin is None or process.stdout is None:
            raise AssertionError("started without pipes")
        asked = {"kind": grammar.kind.value, "text": grammar.text, "seconds": seconds}
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            process.stdin.write(json.dumps(asked).encode() + b"\n")
            process.stdin.flush()
        answer = process.stdout.readline()
        if not answer:
            return False, f"cannot be parsed: the process that does ended with code {process.wait()}"
        timed_out, problem = json.loads(answer)
        return timed_out, problem

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "dspark_core.tokenization.grammar_checking"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is not for it: it ends with its input
        )
        weakref.finalize(self, _end, process)
        return process


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    with process:
        pass


def _main() -> None:
    """A grammar a line, as JSON, and as many answers: whether it timed out, and null or what is wrong."""
    for line in sys.stdin.buffer:
        sys.stdout.write(json.dumps(_answer(json.loads(line))) + "\n")
        sys.stdout.flush()


def _answer(asked: dict[str, Any]) -> tuple[bool, str | None]:
    """Asks a copy of this process, which takes a millisecond to make: starting one anew takes a second on a
    busy machine. This process must have one thread only."""
    reading, writing = os.pipe()
    copy = os.fork()
    if copy == 0:
        try:
            os.close(reading)
            os.close(sys.stdout.fileno())  # whoever reads it must notice if the original ends
            _find_out(asked, writing)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    os.close(writing)
    with open(reading) as answers:
        answer = answers.read()
    code = os.waitstatus_to_exitcode(os.waitpid(copy, 0)[1])
    if answer:
        return False, json.loads(answer)
    if -code in _TIMED_OUT:
        seconds = asked["seconds"]
        return True, f"too complex: finding out whether it can be parsed takes more than {seconds:g} s"
    return False, f"cannot be parsed: the process that does ended with code {code}"


def _find_out(asked: dict[str, Any], writing: int) -> None:
    # Nobody handles their signals, which therefore end the process.
    signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    grammar = Grammar(kind=GrammarKind(asked["kind"]), text=asked["text"])
    answer = json.dumps(deep_thread("grammar").submit(problem_of, grammar).result())
    with open(writing, "w") as answers:
        answers.write(answer)


if __name__ == "__main__":
    _main()
