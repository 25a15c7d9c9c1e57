"""How drafts fare in a domain: recorded rounds, kept together by the request they came from.

A simulated request follows one recorded request round by round, so that its confidences and its
luck belong together and stay as (un)even over its life as they were. Rounds recorded with less than
the whole draft verified do not say what the rest was worth: that is drawn once, from the confidences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_core.engine.trace_format import TracedRequest
from dspark_core.errors import ConfigError
from dspark_core.simulation.trace_reader import Trace

FORMAT = "dspark-domains-1"
DEFAULTS = Path(__file__).parent / "data" / "smollm2-135m-instruct.json"
"""Measured with the shipped drafter; `benchmarks.record_domains` writes such files."""


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """Rounds of one request in order: predicted survival and draft tokens that truly stood."""

    survival: tuple[tuple[float, ...], ...]
    accepted: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class DomainRounds:
    """All rounds of all domains as columns; a request's rounds are contiguous."""

    names: tuple[str, ...]
    survival: NDArray[np.float64]  # [rounds, block]; negative behind a shorter draft
    drafted: NDArray[np.int64]  # [rounds]
    accepted: NDArray[np.int64]  # [rounds]: had the whole draft been verified
    request_start: NDArray[np.int64]  # [requests]
    request_rounds: NDArray[np.int64]  # [requests]
    request_domain: NDArray[np.int64]  # [requests]: index into names

    @property
    def block_size(self) -> int:
        return int(self.survival.shape[1])

    def accepted_length(self, name: str, length: int | None = None) -> float:
        """Mean tokens committed per round in a domain with `length` draft tokens verified (None: all)."""
        rows = self._rounds_of(name)
        limit = self.block_size if length is None else length
        return 1.0 + float(np.minimum(self.accepted[rows], limit).mean())

    def _rounds_of(self, name: str) -> NDArray[np.int64]:
        members = np.flatnonzero(self.request_domain == self.names.index(name))
        spans = [
            np.arange(self.request_start[i], self.request_start[i] + self.request_rounds[i]) for i in members
        ]
        return np.concatenate(spans)


def stack_domains(domains: Mapping[str, Sequence[RecordedRequest]]) -> DomainRounds:
    """Raises ConfigError for a domain without rounds."""
    for name, requests in domains.items():
        if not any(one.accepted for one in requests):
            raise ConfigError(f"domain {name!r} holds no rounds")
    kept = [(d, one) for d, requests in enumerate(domains.values()) for one in requests if one.accepted]
    if not kept:
        raise ConfigError("domains must not be empty")
    counts = np.array([len(one.accepted) for _, one in kept], dtype=np.int64)
    rows = [row for _, one in kept for row in one.survival]
    block = max(1, max(len(row) for row in rows))
    survival = np.full((len(rows), block), -1.0)
    for index, row in enumerate(rows):
        survival[index, : len(row)] = row
    return DomainRounds(
        names=tuple(domains),
        survival=survival,
        drafted=np.array([len(row) for row in rows], dtype=np.int64),
        accepted=np.array([value for _, one in kept for value in one.accepted], dtype=np.int64),
        request_start=np.concatenate(([0], np.cumsum(counts)[:-1])),
        request_rounds=counts,
        request_domain=np.array([d for d, _ in kept], dtype=np.int64),
    )


def domain_of_trace(trace: Trace, seed: int = 0) -> tuple[RecordedRequest, ...]:
    """The traced rounds by request; undrafted rounds say nothing and are left out."""
    rng = np.random.default_rng(seed)
    rounds: dict[str, list[TracedRequest]] = {}
    for one in trace.rounds:
        for request in one.requests:
            if request.survival:
                rounds.setdefault(request.sequence_id, []).append(request)
    return tuple(
        RecordedRequest(
            survival=tuple(one.survival for one in told),
            accepted=tuple(uncensored(one.survival, one.verified, one.accepted, rng) for one in told),
        )
        for told in rounds.values()
    )


def uncensored(survival: Sequence[float], verified: int, accepted: int, rng: np.random.Generator) -> int:
    """Draft tokens that would have stood had all been verified; drawn where that was not seen."""
    if accepted < verified or verified == len(survival):
        return accepted
    reached = survival[verified - 1] if verified else 1.0
    # One uniform decides them all: token k stands with the rest iff it lies below a_k / a_verified.
    mark = rng.random() * reached
    return verified + sum(value > mark for value in survival[verified:])


def read_domains(path: Path = DEFAULTS) -> dict[str, tuple[RecordedRequest, ...]]:
    """Raises ConfigError naming the file and what is wrong with it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read domains {path}: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise ConfigError(f"{path} must be an object with format {FORMAT!r}")
    domains = document.get("domains")
    if not isinstance(domains, dict) or not domains:
        raise ConfigError(f"{path}: domains must be a non-empty object")
    return {name: _read_requests(rows, f"{path}: domain {name!r}") for name, rows in domains.items()}


def _read_requests(rows: Sequence[Mapping[str, Any]], where: str) -> tuple[RecordedRequest, ...]:
    try:
        requests = tuple(
            RecordedRequest(
                survival=tuple(tuple(float(value) for value in row) for row in one["survival"]),
                accepted=tuple(int(value) for value in one["accepted"]),
            )
            for one in rows
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error!r}") from error
    for one in requests:
        if len(one.survival) != len(one.accepted):
            raise ConfigError(
                f"{where}: survival has {len(one.survival)} rounds, accepted {len(one.accepted)}"
            )
        if any(not 0 <= a <= len(row) for a, row in zip(one.accepted, one.survival, strict=True)):
            raise ConfigError(f"{where}: accepted must be in [0, draft length]")
    return requests


def domains_document(
    domains: Mapping[str, Sequence[RecordedRequest]], source: Mapping[str, object]
) -> dict[str, object]:
    """For JSON; `read_domains` is its inverse up to rounding."""
    return {
        "format": FORMAT,
        "source": dict(source),
        "domains": {
            name: [
                {
                    "survival": [[round(value, 3) for value in row] for row in one.survival],
                    "accepted": list(one.accepted),
                }
                for one in requests
            ]
            for name, requests in domains.items()
        },
    }
