"""Evaluates a run: percentiles of what users saw, and whether the promised speed was kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from loadtest.meter import ChatSample, UnfinishedChat


@dataclass(frozen=True, slots=True, kw_only=True)
class Promise:
    """At least `share` of all chats stream at `min_tokens_per_second` or faster and start in time."""

    min_tokens_per_second: float = 0.0
    share: float = 0.95
    max_first_token_ms: float | None = None
    """None: no promise about the first token."""

    def __post_init__(self) -> None:
        if not self.min_tokens_per_second >= 0:
            raise ValueError(f"min_tokens_per_second must be >= 0, got {self.min_tokens_per_second}")
        if self.max_first_token_ms is not None and not self.max_first_token_ms > 0:
            raise ValueError(f"max_first_token_ms must be > 0, got {self.max_first_token_ms}")
        if not 0 < self.share <= 1:
            raise ValueError(f"share must be in (0, 1], got {self.share}")

    def judges(self, sample: ChatSample) -> bool:
        """A one-token chat has no speed, but does have a time to first token."""
        return sample.tokens_per_second is not None or self.max_first_token_ms is not None

    def kept_for(self, sample: ChatSample) -> bool:
        speed, limit = sample.tokens_per_second, self.max_first_token_ms
        fast = speed is None or speed >= self.min_tokens_per_second
        return fast and (limit is None or sample.first_token_seconds * 1000 <= limit)

    def broken_for(self, chat: UnfinishedChat) -> bool:
        """True as soon as the wait for the first token, or the speed since, is worse than promised."""
        limit = self.max_first_token_ms
        begun = chat.waited_seconds if chat.first_token_seconds is None else chat.first_token_seconds
        late = limit is not None and begun * 1000 > limit
        return late or chat.tokens_per_second_at_most < self.min_tokens_per_second

    def __str__(self) -> str:
        begun = "" if self.max_first_token_ms is None else f"a first token in {self.max_first_token_ms:g} ms"
        speed = f"{self.min_tokens_per_second:g} tokens/s" if self.min_tokens_per_second or not begun else ""
        return " and ".join(filter(None, (speed, begun)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """Everything a run collected."""

    samples: tuple[ChatSample, ...] = ()
    unfinished: tuple[UnfinishedChat, ...] = ()
    failed: int = 0
    refused: int = 0
    """Chats answered with 429, by which admission control protects the promise to others."""
    seconds: float = 0.0
    """From the start of the run to its end; 0: unknown."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    kept: bool
    share: float
    """Share of the judged chats that kept the promise."""
    judged: int
    reason: str


def percentile(values: Sequence[float], fraction: float) -> float:
    """The smallest value that at least `fraction` of the values do not exceed (nearest rank)."""
    if not values:
        raise ValueError("percentile of no values")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    return sorted(values)[max(0, math.ceil(fraction * len(values)) - 1)]


def judge(outcomes: Outcomes, promise: Promise) -> Verdict:
    """A failed chat breaks the promise, and so does an unfinished one that is already worse than promised.
    Other unfinished chats, refused ones, and ones too short to have a speed are not judged."""
    samples = [sample for sample in outcomes.samples if promise.judges(sample)]
    broken = sum(map(promise.broken_for, outcomes.unfinished))
    judged = len(samples) + outcomes.failed + broken
    if not judged:
        return Verdict(kept=False, share=0.0, judged=0, reason="no chat could be judged")
    good = sum(map(promise.kept_for, samples))
    share = good / judged
    reason = f"{good} of {judged} chats ({share:.1%}) reached {promise}; promised {promise.share:.1%}"
    if broken:
        reason += f"; already broken when cut off: {broken}"
    return Verdict(kept=share >= promise.share, share=share, judged=judged, reason=reason)


def summarise(outcomes: Outcomes) -> dict[str, object]:
    """Counts, and percentiles of each measure towards its slow end (p95 of a time, p05 of a speed)."""
    samples = outcomes.samples
    speeds = [s.tokens_per_second for s in samples if s.tokens_per_second is not None]
    accepted = [s.accepted_length for s in samples if s.accepted_length is not None]
    tokens = sum(s.completion_tokens for s in samples)
    return {
        "chats": len(samples),
        "unfinished": len(outcomes.unfinished),
        "failed": outcomes.failed,
        "refused": outcomes.refused,
        "completion_tokens": tokens,
        "seconds": round(outcomes.seconds, 3),
        "total_tokens_per_second": tokens / outcomes.seconds if outcomes.seconds else None,
        "first_token_ms": _spread([s.first_token_seconds * 1000 for s in samples], (0.5, 0.95, 0.99)),
        "tokens_per_second": _spread(speeds, (0.5, 0.05, 0.01)),
        "accepted_length": {"mean": sum(accepted) / len(accepted)} if accepted else None,
    }


def report(outcomes: Outcomes, promise: Promise | None) -> dict[str, object]:
    """The JSON report; `promise` and `verdict` are null when nothing was promised."""
    return {
        **summarise(outcomes),
        "promise": asdict(promise) if promise else None,
        "verdict": asdict(judge(outcomes, promise)) if promise else None,
    }


def _spread(values: Sequence[float], fractions: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {f"p{fraction * 100:02.0f}": percentile(values, fraction) for fraction in fractions}


def render(outcomes: Outcomes, promise: Promise | None) -> str:
    """The printed report."""
    summary = summarise(outcomes)
    lines = [
        f"chats {summary['chats']}   unfinished {summary['unfinished']}   failed {summary['failed']}   "
        f"refused (429) {summary['refused']}   tokens {summary['completion_tokens']}"
    ]
    if outcomes.seconds:
        lines.append(
            f"in {outcomes.seconds:.1f} s   tokens/s of all {summary['total_tokens_per_second']:.1f}"
        )
    for label, name in (
        ("time to first token, ms", "first_token_ms"),
        ("tokens/s per user", "tokens_per_second"),
        ("accepted length", "accepted_length"),
    ):
        lines.append(f"{label:<24} {_columns(summary[name])}")
    if promise:
        verdict = judge(outcomes, promise)
        lines.append(f"promise {'KEPT' if verdict.kept else 'BROKEN'}: {verdict.reason}")
    return "\n".join(lines)


def _columns(values: object) -> str:
    if not isinstance(values, dict):
        return "none"
    return "   ".join(f"{name} {value:.2f}" for name, value in values.items())
