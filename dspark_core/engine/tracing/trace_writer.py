"""Writes a round trace from its own thread, with bounded disk usage.

`put` never waits: if the queue is full, the record is dropped and counted. Lines are appended whole, so a
killed process loses the queued records and leaves at most one broken line, which the next writer cuts off.
"""

from __future__ import annotations

import logging
import math
import os
import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from dspark_core.engine.tracing.trace_format import TracedCurve, TracedRound, TraceHeader, TraceRecord, encode
from dspark_core.errors import ConfigError

_log = logging.getLogger(__name__)

MAX_QUEUED_RECORDS = 1024
MAX_LINES_PER_WRITE = 64
REMIND_SECONDS = 60.0
"""Interval between log messages while writing keeps failing."""

DEFAULT_SAMPLE, DEFAULT_MAX_MB = 0.1, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """Where and how much to trace."""

    path: Path
    sample: float = DEFAULT_SAMPLE
    """Share of rounds that are traced."""
    max_bytes: int = DEFAULT_MAX_MB * 2**20
    """Per file; a full file becomes FILE.1, the previous one FILE.2 and so on."""
    max_files: int = 4
    """Files kept, including the one being written: disk usage is at most this times `max_bytes`."""

    def __post_init__(self) -> None:
        if not 0.0 < self.sample <= 1.0:  # NaN fails too
            raise ConfigError(f"trace sample must be in (0, 1], got {self.sample}")
        if self.max_bytes < 4096:
            raise ConfigError(f"trace max_bytes must be >= 4096, got {self.max_bytes}")
        if self.max_files < 1:
            raise ConfigError(f"trace max_files must be >= 1, got {self.max_files}")


class TraceWriter:
    def __init__(
        self, options: TraceOptions, header: TraceHeader, *, queued: int = MAX_QUEUED_RECORDS
    ) -> None:
        """Raises ConfigError if the file cannot be opened: better to fail at start than silently later."""
        self.options = options
        self._header = header
        self._curve: TracedCurve | None = None
        self._queue: queue.Queue[TraceRecord | None] = queue.Queue(queued)
        self._dropped = 0
        self._warned_at = -math.inf  # last message about failing writes; -inf: they do not fail
        self._closing = False
        self._file: int | None = None
        try:
            self._opened()
        except OSError as error:
            raise ConfigError(f"cannot write the trace {options.path}: {error}") from error
        self._thread = threading.Thread(target=self._run, name="trace", daemon=True)
        self._thread.start()

    @property
    def dropped(self) -> int:
        """Records lost to a full queue or a failing disk."""
        return self._dropped

    def put(self, record: TracedRound | TracedCurve) -> None:
        """Never blocks and never fails."""
        try:
            self._queue.put_nowait(record)
        except queue.Full:
            self._drop(1)

    def close(self, timeout_seconds: float = 5.0) -> None:
        """Writes what is queued; gives up on a hanging disk after the timeout."""
        if self._closing:
            return
        self._closing = True
        try:
            self._queue.put(None, timeout=timeout_seconds)
        except queue.Full:
            return
        self._thread.join(timeout_seconds)

    def _drop(self, count: int) -> None:
        if self._dropped == 0:
            _log.warning("the round trace %s loses records", self.options.path)
        self._dropped += count

    def _log_failure(self, error: OSError) -> None:
        """Logs at most once per REMIND_SECONDS: a message per round would fill the log's disk as well."""
        now = time.monotonic()
        if now - self._warned_at >= REMIND_SECONDS:
            _log.warning(
                "cannot write the trace %s: %s; %d records lost", self.options.path, error, self._dropped
            )
            self._warned_at = now

    def _log_recovery(self, wrote: bool) -> None:
        if wrote and self._warned_at > -math.inf:
            _log.warning("the trace %s is written again, %d records lost", self.options.path, self._dropped)
            self._warned_at = -math.inf

    def _run(self) -> None:
        ended = False
        while not ended:
            records, ended = self._take()
            try:
                self._write(records)
            except OSError as error:
                self._drop(len(records))
                self._log_failure(error)
            else:
                self._log_recovery(bool(records))
        self._close()

    def _take(self) -> tuple[list[TraceRecord], bool]:
        """Waits for a record, then takes any others that are queued; True means the queue has ended."""
        records: list[TraceRecord] = []
        item = self._queue.get()
        while item is not None:
            records.append(item)
            if len(records) == MAX_LINES_PER_WRITE:
                return records, False
            try:
                item = self._queue.get_nowait()
            except queue.Empty:
                return records, False
        return records, True

    def _write(self, records: list[TraceRecord]) -> None:
        file, lines = self._opened(), list[bytes]()
        room = self.options.max_bytes - os.fstat(file).st_size
        for record in records:
            if isinstance(record, TracedCurve):
                self._curve = record
            line = encode(record)
            if len(line) > room:
                _append(file, lines)
                lines = []
                file = self._rotated()
                room = self.options.max_bytes - os.fstat(file).st_size
                if isinstance(record, TracedCurve):
                    continue  # the new file already starts with it
            lines.append(line)
            room -= len(line)
        _append(file, lines)

    def _opened(self) -> int:
        """The file at the path: a deleted one would keep its space on the disk and take what nobody can read.

        An earlier run's file is continued after its last whole line.
        """
        if self._file is not None and _is_at(self._file, self.options.path):
            return self._file
        self._close()
        self.options.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.options.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        try:
            os.ftruncate(self._file, _end_of_last_line(self._file))
            _append(self._file, [encode(record) for record in (self._header, self._curve) if record])
        except OSError:
            self._close()  # to begin the next attempt with these lines
            raise
        return self._file

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _rotated(self) -> int:
        path, last = self.options.path, self.options.max_files - 1
        for number in range(last, 0, -1):
            older = path if number == 1 else rotated(path, number - 1)
            if older.exists():
                older.replace(rotated(path, number))
        path.unlink(missing_ok=True)  # still there only if max_files = 1
        return self._opened()


def rotated(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def _is_at(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except OSError:
        return False


def _append(file: int, lines: list[bytes]) -> None:
    """All lines or none: a full disk may take part of one, which would spoil the next one as well."""
    data = memoryview(b"".join(lines))
    whole = os.fstat(file).st_size
    try:
        while data:
            data = data[os.write(file, data) :]
    except OSError:
        os.ftruncate(file, whole)
        raise


def _end_of_last_line(file: int) -> int:
    """Size of the file without a last line that was cut short."""
    size = os.fstat(file).st_size
    end, step = size, 4096
    while end > 0:
        start = max(0, end - step)
        newline = os.pread(file, end - start, start).rfind(b"\n")
        if newline >= 0:
            return start + newline + 1
        end = start
    return 0
