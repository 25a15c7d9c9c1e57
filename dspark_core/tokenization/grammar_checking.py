"""Whether a grammar can be parsed, found out in a process of its own.

Some small grammars keep llguidance busy for a minute (twenty patterns that have to hold at once) or for hours
(each further one about doubles that), with memory that grows, and what a thread runs cannot be stopped. A
process ends itself when its time is over, and a new one takes its place.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import weakref
from concurrent.futures import Future, ThreadPoolExecutor

from dspark_core.errors import InvalidRequestError
from dspark_core.output_rules import Grammar, GrammarKind
from dspark_core.tokenization.deep_threads import deep_thread
from dspark_core.tokenization.grammar_sources import problem_of

CHECK_SECONDS = 1.0
"""Of a processor's time for one grammar; large ones that are meant take a tenth of it."""
HANG_SECONDS = 30.0
"""Of any time, on a machine that hardly gives the process a processor."""
_TIMED_OUT = (-signal.SIGPROF, -signal.SIGALRM)


class GrammarChecker:
    """Threads may share it. Its process starts with the first grammar and ends with it."""

    def __init__(self, check_seconds: float = CHECK_SECONDS) -> None:
        self._check_seconds = check_seconds
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar-check")
        self._process: subprocess.Popen[bytes] | None = None

    def check(self, grammar: Grammar, field: str) -> Future[None]:
        """Fails with InvalidRequestError that names `field`, for what is no grammar with any tokenizer, or
        takes too long to find out."""
        return self._thread.submit(self._check, grammar, field)

    def _check(self, grammar: Grammar, field: str) -> None:
        asked = {"kind": grammar.kind.value, "text": grammar.text, "seconds": self._check_seconds}
        problem = self._answer(json.dumps(asked).encode() + b"\n")
        if problem is not None:
            raise InvalidRequestError(f"{field}: {problem}", field=field)

    def _answer(self, line: bytes) -> str | None:
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        if process.stdin is None or process.stdout is None:
            raise AssertionError("started without pipes")
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            process.stdin.write(line)
            process.stdin.flush()
        answer = process.stdout.readline()
        if answer:
            return str(problem) if (problem := json.loads(answer)) is not None else None
        if process.wait() in _TIMED_OUT:
            return (
                f"too complex: finding out whether it can be parsed takes more than {self._check_seconds:g} s"
            )
        return f"cannot be parsed: the process that does ended with code {process.returncode}"

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
    """A grammar a line, as JSON, and as many answers: null, or what is wrong with it."""
    thread = deep_thread("grammar")
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        grammar = Grammar(kind=GrammarKind(asked["kind"]), text=asked["text"])
        # Nobody handles their signals, which therefore end the process.
        signal.setitimer(signal.ITIMER_PROF, asked["seconds"])
        signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
        answer = json.dumps(thread.submit(problem_of, grammar).result())
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.stdout.write(answer + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _main()
