"""Reads round traces. Errors name file and line; a last line truncated by a kill is skipped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_core.engine.tracing.trace_format import TracedCurve, TracedRound, TraceHeader, TraceRecord, decode
from dspark_core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Trace:
    rounds: tuple[TracedRound, ...]
    """Rounds that decoded something, in the order of the files."""
    prefill_rounds: int
    """Number of prefill-only rounds, in which nothing was planned."""
    curves: Mapping[str, Mapping[str, object]]
    """Step-time documents by version, the newest last."""
    models: tuple[str, ...]
    cut_lines: int
    """Number of truncated last lines."""


def read_trace(paths: Sequence[Path]) -> Trace:
    """Raises ConfigError naming file and line, or if there is no decoding round."""
    rounds: list[TracedRound] = []
    curves: dict[str, Mapping[str, object]] = {}
    models: dict[str, None] = {}
    prefill_rounds = cut_lines = 0
    for path in paths:
        for record in _records(path):
            match record:
                case TraceHeader():
                    models[record.model] = None
                case TracedCurve():
                    curves.pop(record.version, None)
                    curves[record.version] = record.document
                case TracedRound() if record.requests:
                    rounds.append(record)
                case TracedRound():
                    prefill_rounds += 1
                case None:
                    cut_lines += 1
    if not rounds:
        raise ConfigError(f"no decoding round in {', '.join(str(path) for path in paths)}")
    return Trace(
        rounds=tuple(rounds),
        prefill_rounds=prefill_rounds,
        curves=curves,
        models=tuple(models),
        cut_lines=cut_lines,
    )


def _records(path: Path) -> Iterator[TraceRecord | None]:
    """None stands for a truncated last line."""
    headed = False
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith("\n"):
                    yield None
                    return
                try:
                    record = decode(line)
                except ConfigError as error:
                    raise ConfigError(f"{path}:{number}: {error}") from error
                headed = headed or isinstance(record, TraceHeader)
                if not headed:
                    raise ConfigError(f"{path}:{number}: a trace must begin with a header")
                yield record
    except OSError as error:
        raise ConfigError(f"cannot read trace {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8: {error}") from error
