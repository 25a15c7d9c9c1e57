"""The format of a round trace: versioned JSON lines of three kinds. No torch: replay needs none.

A file begins with a header, a curve follows whenever the step-time curve changes, and all other lines are
rounds. Every rotated file is self-contained. `docs/simulation.md` describes each field.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dspark_core.errors import ConfigError

SCHEMA = "dspark-trace-1"
"""Changes when the meaning of a field changes, but not when fields are added."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceHeader:
    replica_id: str
    model: str
    sample: float
    """Share of rounds that are traced."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedCurve:
    version: str
    document: Mapping[str, object]
    """Written by the curve's own `to_dict`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRequest:
    """One request of a traced round; `accepted <= verified <= len(survival)`."""

    sequence_id: str
    survival: tuple[float, ...]
    """a_1, a_2, ... as the planner saw them; empty without a draft."""
    planned: int
    """The verify length that the planner chose."""
    verified: int
    """Draft tokens that were verified; fewer than planned if pages or batch tokens ran out."""
    accepted: int
    min_tokens_per_second: float = 0.0
    coupled: bool = False
    """Coupled, greedy or looked up: the planner may look ahead."""
    looked_up: bool = False
    """The tokens were looked up, not drafted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRound:
    at: float
    """End of the round in Unix seconds."""
    round: int
    planner: str
    """Name of the planner whose plan was followed; empty for a prefill-only round."""
    curve_version: str
    """Version of the `TracedCurve` that the planner had at start; empty if none."""
    batch_tokens: int
    """Anchors, verified draft tokens and prefill."""
    step_seconds: float
    draft_seconds: float
    requests: tuple[TracedRequest, ...]
    context_tokens: int = 0
    """Tokens of all its requests that were in the cache before the pass."""
    loop_seconds: float = 0.0
    """Time since the previous pass, without drafting; 0 after an idle time and in older traces."""

    @property
    def decode_tokens(self) -> int:
        return sum(1 + request.verified for request in self.requests)

    @property
    def prefill_tokens(self) -> int:
        return max(self.batch_tokens - self.decode_tokens, 0)


TraceRecord = TraceHeader | TracedCurve | TracedRound


def encode(record: TraceRecord) -> bytes:
    """One line, including its line break."""
    match record:
        case TraceHeader():
            row: dict[str, object] = {
                "kind": "header",
                "schema": SCHEMA,
                "replica": record.replica_id,
                "model": record.model,
                "sample": record.sample,
            }
        case TracedCurve():
            row = {"kind": "curve", "version": record.version, "curve": record.document}
        case TracedRound():
            row = _round_row(record)
    return (json.dumps(row, separators=(",", ":"), allow_nan=False) + "\n").encode()


def _round_row(record: TracedRound) -> dict[str, object]:
    return {
        "kind": "round",
        "at": round(record.at, 4),
        "round": record.round,
        "planner": record.planner,
        "curve": record.curve_version,
        "batch_tokens": record.batch_tokens,
        "context_tokens": record.context_tokens,
        "step_seconds": round(record.step_seconds, 7),
        "draft_seconds": round(record.draft_seconds, 7),
        "loop_seconds": round(record.loop_seconds, 7),
        "requests": [
            {
                "id": request.sequence_id,
                "survival": [round(value, 5) for value in request.survival],
                "planned": request.planned,
                "verified": request.verified,
                "accepted": request.accepted,
                "floor": request.min_tokens_per_second,
                "coupled": request.coupled,
                "looked_up": request.looked_up,
            }
            for request in record.requests
        ],
    }


def decode(line: str) -> TraceRecord:
    """Raises a ConfigError that says what is wrong with the line, but not where the line is."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(f"not valid JSON: {error}") from error
    if not isinstance(row, dict):
        raise ConfigError(f"must be an object, got {type(row).__name__}")
    kind = row.get("kind")
    if kind == "header":
        if row.get("schema") != SCHEMA:
            raise ConfigError(f"schema must be {SCHEMA!r}, got {row.get('schema')!r}")
        return TraceHeader(
            replica_id=_text(row, "replica"), model=_text(row, "model"), sample=_number(row, "sample")
        )
    if kind == "curve":
        curve = row.get("curve")
        if not isinstance(curve, dict):
            raise ConfigError(f"curve must be an object, got {curve!r}")
        return TracedCurve(version=_text(row, "version"), document=curve)
    if kind == "round":
        return _decode_round(row)
    raise ConfigError(f"kind must be header, curve or round, got {kind!r}")


def _decode_round(row: Mapping[str, Any]) -> TracedRound:
    requests = row.get("requests")
    if not isinstance(requests, list) or not all(isinstance(one, dict) for one in requests):
        raise ConfigError(f"requests must be a list of objects, got {str(requests)[:60]}")
    return TracedRound(
        at=_number(row, "at"),
        round=_count(row, "round"),
        planner=_text(row, "planner"),
        curve_version=_text(row, "curve"),
        batch_tokens=_count(row, "batch_tokens"),
        step_seconds=_number(row, "step_seconds"),
        draft_seconds=_number(row, "draft_seconds"),
        requests=tuple(_decode_request(one) for one in requests),
        context_tokens=_count(row, "context_tokens"),
        loop_seconds=_number(row, "loop_seconds") if "loop_seconds" in row else 0.0,
    )


def _decode_request(row: Mapping[str, Any]) -> TracedRequest:
    values = row.get("survival")
    if not isinstance(values, list) or not all(_is_number(value) for value in values):
        raise ConfigError(f"survival must be a list of numbers, got {values!r}")
    survival = tuple(float(value) for value in values)
    if any(not 0.0 <= value <= 1.0 for value in survival) or any(
        later > earlier for earlier, later in pairwise(survival)
    ):
        raise ConfigError(f"survival must be in [0, 1] and never rise, got {values!r}")
    planned, verified, accepted = (_count(row, name) for name in ("planned", "verified", "accepted"))
    if not accepted <= verified <= len(survival):
        raise ConfigError(
            f"accepted <= verified <= draft length must hold, got {accepted}, {verified}, {len(survival)}"
        )
    return TracedRequest(
        sequence_id=_text(row, "id"),
        survival=survival,
        planned=planned,
        verified=verified,
        accepted=accepted,
        min_tokens_per_second=_number(row, "floor"),
        coupled=row.get("coupled") is True,
        looked_up=row.get("looked_up") is True,
    )


def _text(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a text, got {value!r}")
    return value


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _number(row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    if not _is_number(value) or float(value) < 0:  # type: ignore[arg-type]
        raise ConfigError(f"{name} must be a number >= 0, got {value!r}")
    return float(value)  # type: ignore[arg-type]


def _count(row: Mapping[str, Any], name: str) -> int:
    value = row.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ConfigError(f"{name} must be a whole number >= 0, got {value!r}")
    return value
