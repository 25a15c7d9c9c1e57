"""Reads a verifier's rounds from its trace and summarises them over spans of time."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_core.engine.tracing.trace_format import TracedRound, decode
from dspark_core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Summary of one verifier's rounds within some spans of time."""

    rounds: int
    requests: float
    """Mean requests per round."""
    verify_length: float
    """Mean draft tokens verified per request and round."""
    offered_length: float
    """Mean draft tokens per request and round, whether verified or not."""
    drafted_share: float
    """Share of request rounds with a draft from the drafter."""
    step_seconds: float
    """Mean over rounds."""


def traced_rounds(path: Path) -> list[TracedRound]:
    """Skips lines that cannot be decoded, since the last one may still be being written."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = decode(line)
        except ConfigError:
            continue
        if isinstance(record, TracedRound):
            found.append(record)
    return found


def stretch(rounds: Sequence[TracedRound], spans: Iterable[tuple[float, float]]) -> Stretch:
    """`spans`: (start, end) in Unix seconds. Only rounds without prefill count."""
    spans = list(spans)
    within = [
        one
        for one in rounds
        if one.requests
        and one.batch_tokens == one.decode_tokens
        and any(start <= one.at < end for start, end in spans)
    ]
    requests = [request for one in within for request in one.requests]
    count = max(len(requests), 1)
    return Stretch(
        rounds=len(within),
        requests=len(requests) / max(len(within), 1),
        verify_length=sum(request.verified for request in requests) / count,
        offered_length=sum(len(request.survival) for request in requests) / count,
        drafted_share=sum(bool(request.survival) and not request.looked_up for request in requests) / count,
        step_seconds=sum(one.step_seconds for one in within) / max(len(within), 1),
    )
