"""Models how long a round takes: drafting, network, one target step, and the loop around it.

Planners divide expected tokens by
`T_draft(requests drafted) + T_network + T_verify(requests, batch tokens, context tokens) + T_loop(requests)`.
A round without drafts pays neither of the first two, and one whose drafts were made during another
cohort's pass pays only the part that the pass did not hide.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np

from dspark_core.algorithms.loop_time import NO_LOOP, LoopTimeModel
from dspark_core.algorithms.step_surface import Floats
from dspark_core.algorithms.step_time import StepTimeModel
from dspark_core.errors import ConfigError
from dspark_core.records import RoundReport

RATE = 0.1
"""Weight of the newest round in the drafting and network estimates."""
MAX_SURPRISE = 2.0
"""Bound on the factor by which one round may deviate from the expectation."""


@dataclass(frozen=True, slots=True)
class DraftTimeModel:
    """Seconds to draft blocks for a number of requests at once; linear between points."""

    requests: tuple[int, ...] = ()
    """Strictly increasing; empty: unknown, assumed free until `observed`."""
    draft_seconds: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if len(self.requests) != len(self.draft_seconds):
            raise ConfigError(
                f"draft_seconds must have one value for each of {len(self.requests)} requests, "
                f"got {len(self.draft_seconds)}"
            )
        if any(count < 1 for count in self.requests) or any(a >= b for a, b in pairwise(self.requests)):
            raise ConfigError(f"requests must be >= 1 and strictly increasing, got {self.requests}")
        for seconds in self.draft_seconds:
            _check_seconds(seconds, "draft_seconds")

    def seconds(self, requests: int) -> float:
        """0 for no requests; constant below the first point, at the last slope beyond the last."""
        known, seconds = self.requests, self.draft_seconds
        if requests < 1 or not known:
            return 0.0
        if requests <= known[0]:
            return seconds[0]
        if requests >= known[-1]:
            if len(known) == 1:
                return seconds[0]
            slope = (seconds[-1] - seconds[-2]) / (known[-1] - known[-2])
            return seconds[-1] + max(slope, 0.0) * (requests - known[-1])
        right = bisect_left(known, requests)
        share = (requests - known[right - 1]) / (known[right] - known[right - 1])
        return (1.0 - share) * seconds[right - 1] + share * seconds[right]

    def table(self, requests: Floats) -> Floats:
        """`seconds` of ascending request counts >= 1."""
        if not self.requests:
            return np.zeros(len(requests))
        last, inside = self.requests[-1], np.interp(requests, self.requests, self.draft_seconds)
        if not len(requests) or requests[-1] <= last:
            return inside
        slope = self.seconds(last + 1) - self.seconds(last)
        table: Floats = inside + slope * np.maximum(requests - last, 0.0)
        return table

    def observed(self, requests: int, seconds: float) -> DraftTimeModel:
        """Scales the whole curve towards the observation; an empty model starts with this point."""
        if requests < 1:
            raise ConfigError(f"requests of an observed draft must be >= 1, got {requests}")
        _check_seconds(seconds, "seconds of an observed draft")
        if not self.requests:
            return DraftTimeModel((requests,), (seconds,))
        known = self.seconds(requests)
        if known <= 0:
            return replace(self, draft_seconds=tuple(value + RATE * seconds for value in self.draft_seconds))
        surprise = min(max(seconds / known, 1.0 / MAX_SURPRISE), MAX_SURPRISE)
        factor = surprise**RATE
        return replace(self, draft_seconds=tuple(value * factor for value in self.draft_seconds))


@dataclass(frozen=True, slots=True)
class RoundTimeModel:
    verify: StepTimeModel
    draft: DraftTimeModel = DraftTimeModel()
    network_seconds: float = 0.0
    """Round trip between verifier and drafter, per round."""
    loop: LoopTimeModel = NO_LOOP
    beside_seconds: float | None = None
    """Duration of the other cohort's pass, which hides drafting; None: nothing hides it."""

    def __post_init__(self) -> None:
        _check_seconds(self.network_seconds, "network_seconds")
        if self.beside_seconds is not None:
            _check_seconds(self.beside_seconds, "beside_seconds")

    def overhead_seconds(self, drafted: int) -> float:
        """Time before the target step of a round that drafts for `drafted` requests."""
        if drafted <= 0:
            return 0.0
        drafting = self.draft.seconds(drafted)
        whole = drafting + self.network_seconds
        if self.beside_seconds is None:
            return whole
        # Drafts are requested when the previous round ends. Each cohort waits for half of what the two passes
        # do not hide, and one drafter has to serve both cohorts.
        return max(0.5 * (whole - self.beside_seconds), drafting - self.beside_seconds, 0.0)

    def overhead_table(self, max_drafted: int) -> Floats:
        """`overhead_seconds` for 0, 1, ... `max_drafted` -> [max_drafted + 1]."""
        drafting = self.draft.table(np.arange(max_drafted + 1, dtype=np.float64))
        seconds = drafting + self.network_seconds
        if self.beside_seconds is not None:
            left = np.maximum(0.5 * (seconds - self.beside_seconds), drafting - self.beside_seconds)
            seconds = np.maximum(left, 0.0)
        seconds[0] = 0.0
        return seconds

    def seconds(self, requests: int, batch_tokens: float, context_tokens: int = 0, drafted: int = 0) -> float:
        step = self.verify.seconds(requests, batch_tokens, context_tokens)
        return self.overhead_seconds(drafted) + step + self.loop.seconds(requests)

    def table(
        self, requests: int, max_draft_tokens: int, context_tokens: int = 0, drafted: int = 0
    ) -> Floats:
        """Seconds of rounds that verify 0, 1, ... `max_draft_tokens` -> [max_draft_tokens + 1]."""
        tokens = np.arange(requests, requests + max_draft_tokens + 1, dtype=np.int64)
        beside = self.overhead_seconds(drafted) + self.loop.seconds(requests)
        return self.verify.table(requests, tokens, context_tokens) + beside

    def observed_step(
        self, requests: int, batch_tokens: int, context_tokens: int, seconds: float
    ) -> RoundTimeModel:
        return replace(self, verify=self.verify.observed(requests, batch_tokens, context_tokens, seconds))

    def observed_loop(self, requests: int, seconds: float) -> RoundTimeModel:
        return replace(self, loop=self.loop.observed(requests, seconds))

    def observed_draft(
        self, drafted: int, wait_seconds: float, compute_seconds: float | None = None
    ) -> RoundTimeModel:
        """`compute_seconds` as reported by the drafter; the rest of the wait is attributed to the network.

        Without it, the known network time is subtracted and the rest counts as drafting.
        """
        if compute_seconds is None:
            compute = max(wait_seconds - self.network_seconds, 0.0)
            return replace(self, draft=self.draft.observed(drafted, compute))
        transit = max(wait_seconds - compute_seconds, 0.0)
        network = self.network_seconds + RATE * (transit - self.network_seconds)
        return replace(self, draft=self.draft.observed(drafted, compute_seconds), network_seconds=network)

    def learned(self, report: RoundReport, *, typical: bool) -> RoundTimeModel:
        """Updates on a round. `typical`: its drafts took what they usually take."""
        model, requests = self, len(report.requests)
        if requests and report.loop_seconds > 0:
            model = model.observed_loop(requests, report.loop_seconds)
        drafted = sum(request.drafted for request in report.requests)
        if drafted and report.draft_seconds > 0 and typical:
            # The pass time is given separately, so that queueing is not mistaken for a slow drafter.
            model = model.observed_draft(drafted, report.draft_seconds, report.draft_compute_seconds or None)
        step = decoding_step(report)
        return model if step is None else model.observed_step(*step)

    def to_dict(self) -> dict[str, Any]:
        """JSON-compatible; inverse of `from_dict`."""
        return {
            "verify": self.verify.to_dict(),
            "draft": {
                "requests": list(self.draft.requests),
                "draft_seconds": list(self.draft.draft_seconds),
            },
            "network_seconds": self.network_seconds,
            "loop": {
                "round_seconds": self.loop.round_seconds,
                "request_seconds": self.loop.request_seconds,
            },
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> RoundTimeModel:
        """Also accepts a bare step-time model or a legacy curve. Raises `ConfigError`."""
        if "verify" not in data:
            return cls(StepTimeModel.from_dict(data))
        draft = data.get("draft", {})
        loop = data.get("loop", {})
        if not all(isinstance(part, Mapping) for part in (data["verify"], draft, loop)):
            raise ConfigError("verify, draft and loop of a round-time model must be objects")
        requests = _numbers(draft.get("requests", ()), "requests")
        return cls(
            StepTimeModel.from_dict(data["verify"]),
            DraftTimeModel(
                tuple(int(value) for value in requests),
                tuple(_numbers(draft.get("draft_seconds", ()), "draft_seconds")),
            ),
            _numbers([data.get("network_seconds", 0.0)], "network_seconds")[0],
            LoopTimeModel(
                *(_numbers([loop.get(name, 0.0)], name)[0] for name in ("round_seconds", "request_seconds"))
            ),
        )


def decoding_step(report: RoundReport) -> tuple[int, int, int, float] | None:
    """Requests, batch tokens, context tokens and seconds of the round's step. None without a time, and for a
    step that included a prefill chunk, which is of another kind."""
    decoded = sum(1 + request.verify_length for request in report.requests)
    if not report.requests or report.batch_tokens != decoded or report.step_seconds <= 0:
        return None
    return len(report.requests), decoded, report.context_tokens, report.step_seconds


def _check_seconds(value: float, name: str) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ConfigError(f"{name} must be >= 0, got {value}")


def _numbers(values: object, name: str) -> list[float]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise ConfigError(f"{name} of a round-time model must be a list, got {values!r}")
    for value in values:
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ConfigError(f"{name} of a round-time model must hold numbers, got {value!r}")
    return [float(value) for value in values]
