"""What a verifier verified over time, read from its trace."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dspark_core.engine.trace_format import TracedRound, decode
from dspark_core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stretch:
    """Rounds of one verifier within some seconds, of one or several tries together."""

    rounds: int
    requests: float
    """Mean of a round."""
    verify_length: float
    """Mean draft tokens of a request and round."""
    offered_length: float
    """Of those there were drafts of, whether verified or not."""
    drafted_share: float
    """Of the requests' rounds, those the drafter was asked for."""
    step_seconds: float
    """Mean."""


def traced_rounds(path: Path) -> list[TracedRound]:
    """Complete lines only: the last may be being written."""
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
    """`spans`: unix seconds from and to. Rounds that hold no prompt's chunk are counted."""
    spans = list(spans)
    within = [
        one
        for one in rounds
        if one.requests
        and one.batch_tokens == one.decode_tokens
        and any(start <= one.at < end for start, end in spans)
    ]
    told = [request for one in within for request in one.requests]
    count = max(len(told), 1)
    return Stretch(
        rounds=len(within),
        requests=len(told) / max(len(within), 1),
        verify_length=sum(request.verified for request in told) / count,
        offered_length=sum(len(request.survival) for request in told) / count,
        drafted_share=sum(bool(request.survival) and not request.looked_up for request in told) / count,
        step_seconds=sum(one.step_seconds for one in within) / max(len(within), 1),
    )
