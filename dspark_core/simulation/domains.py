"""Recorded draft outcomes by domain, grouped by the request they came from.

A simulated request follows one recorded request, so that its confidences match its outcomes and vary over
its life as recorded. Recordings by token have a row for every position of the answer: a round that commits
three tokens advances three rows, to what a real round would have met there. A trace only holds the rounds
that took place and is followed round by round; where only part of a draft was verified, the outcome of the
rest is drawn once, from the confidences.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspark_core.engine.tracing.trace_format import TracedRequest
from dspark_core.errors import ConfigError
from dspark_core.simulation.trace_reader import Trace

FORMAT = "dspark-domains-2"
DEFAULTS = Path(__file__).parent / "data" / "smollm2-135m-instruct.json"
"""Measured with the shipped drafter; `benchmarks.record_domains` writes such files."""


@dataclass(frozen=True, slots=True)
class RecordedRequest:
    """Rows of one request in order: predicted survival and the number of draft tokens accepted."""

    survival: tuple[tuple[float, ...], ...]
    accepted: tuple[int, ...]
    looked_up: tuple[tuple[float, ...], ...] = ()
    """Survival of the tokens looked up at each row, () where none were found; no rows: lookup was off."""
    looked_up_accepted: tuple[int, ...] = ()
    by_token: bool = False
    """One row per answer token except the last, rather than one per round."""


@dataclass(frozen=True, slots=True)
class DomainRounds:
    """All rows of all domains as columns; a request's rows are contiguous."""

    names: tuple[str, ...]
    survival: NDArray[np.float64]  # [rows, block]; negative past the end of a shorter draft
    accepted: NDArray[np.int64]  # [rows]: if the whole draft were verified
    looked_up: NDArray[np.float64]  # [rows, longest]; as survival
    looked_up_accepted: NDArray[np.int64]  # [rows]
    request_start: NDArray[np.int64]  # [requests]
    request_rows: NDArray[np.int64]  # [requests]
    request_by_token: NDArray[np.bool_]  # [requests]
    request_domain: NDArray[np.int64]  # [requests]: index into names

    @property
    def block_size(self) -> int:
        return int(self.survival.shape[1])

    @property
    def longest(self) -> int:
        """Maximum draft tokens per request and round, from drafter or lookup."""
        return max(self.block_size, int(self.looked_up.shape[1]))

    def accepted_length(self, name: str, length: int | None = None) -> float:
        """Mean committed tokens per round in a domain with `length` drafter tokens verified (None: all)."""
        limit = self.block_size if length is None else length
        rounds = [
            1 + min(accepted, limit)
            for request in np.flatnonzero(self.request_domain == self.names.index(name))
            for accepted in self._rounds(int(request), limit)
        ]
        return sum(rounds) / len(rounds)

    def answer_tokens(self) -> NDArray[np.int64]:
        """Lengths of the recorded answers [requests]."""
        ends = self.request_start + self.request_rows
        spans = zip(self.request_start, ends, strict=True)
        stood = 1 + self.accepted + self.looked_up_accepted  # in traced rows, one of the two is zero
        by_rounds = np.array([1 + int(stood[start:end].sum()) for start, end in spans])
        return np.where(self.request_by_token, 1 + self.request_rows, by_rounds)

    def _rounds(self, request: int, limit: int) -> list[int]:
        """Accepted draft tokens per round, for the rounds the request would have taken."""
        start, rows = int(self.request_start[request]), int(self.request_rows[request])
        accepted: list[int] = self.accepted[start : start + rows].tolist()
        if not self.request_by_token[request]:
            return accepted
        found, place = [], 0
        while place < rows:
            found.append(accepted[place])
            place += 1 + min(accepted[place], limit)
        return found


def stack_domains(domains: Mapping[str, Sequence[RecordedRequest]]) -> DomainRounds:
    """Raises ConfigError for a domain without rounds."""
    for name, requests in domains.items():
        if not any(one.accepted for one in requests):
            raise ConfigError(f"domain {name!r} holds no rounds")
    kept = [(d, one) for d, requests in enumerate(domains.values()) for one in requests if one.accepted]
    if not kept:
        raise ConfigError("domains must not be empty")
    counts = np.array([len(one.accepted) for _, one in kept], dtype=np.int64)
    looked_up = [one.looked_up or ((),) * len(one.accepted) for _, one in kept]
    found = [one.looked_up_accepted or (0,) * len(one.accepted) for _, one in kept]
    return DomainRounds(
        names=tuple(domains),
        survival=_padded([row for _, one in kept for row in one.survival], at_least=1),
        accepted=np.array([value for _, one in kept for value in one.accepted], dtype=np.int64),
        looked_up=_padded([row for rows in looked_up for row in rows], at_least=0),
        looked_up_accepted=np.array([value for values in found for value in values], dtype=np.int64),
        request_start=np.concatenate(([0], np.cumsum(counts)[:-1])),
        request_rows=counts,
        request_by_token=np.array([one.by_token for _, one in kept], dtype=np.bool_),
        request_domain=np.array([d for d, _ in kept], dtype=np.int64),
    )


def _padded(rows: Sequence[Sequence[float]], at_least: int) -> NDArray[np.float64]:
    """[rows, longest], padded with negative values."""
    padded = np.full((len(rows), max([at_least, *map(len, rows)])), -1.0)
    for index, row in enumerate(rows):
        padded[index, : len(row)] = row
    return padded


def domain_of_trace(trace: Trace) -> tuple[RecordedRequest, ...]:
    """The traced rounds by request, without those that had no draft."""
    rng = np.random.default_rng(0)
    rounds: dict[str, list[TracedRequest]] = {}
    for one in trace.rounds:
        for request in one.requests:
            if request.survival:
                rounds.setdefault(request.sequence_id, []).append(request)
    return tuple(_followed(requests, rng) for requests in rounds.values())


def _followed(requests: Sequence[TracedRequest], rng: np.random.Generator) -> RecordedRequest:
    """Each round's draft came from either drafter or lookup; what the other would have drafted is unknown."""
    stood = [uncensored(one.survival, one.verified, one.accepted, rng) for one in requests]
    return RecordedRequest(
        survival=tuple(() if one.looked_up else one.survival for one in requests),
        accepted=tuple(0 if one.looked_up else value for one, value in zip(requests, stood, strict=True)),
        looked_up=tuple(one.survival if one.looked_up else () for one in requests),
        looked_up_accepted=tuple(
            value if one.looked_up else 0 for one, value in zip(requests, stood, strict=True)
        ),
    )


def uncensored(survival: Sequence[float], verified: int, accepted: int, rng: np.random.Generator) -> int:
    """Draft tokens that would be accepted if all were verified; drawn at random where not observed."""
    if accepted < verified or verified == len(survival):
        return accepted
    reached = survival[verified - 1] if verified else 1.0
    # One uniform draw u decides all positions: token k is accepted iff u < a_k / a_verified.
    mark = rng.random() * reached
    return verified + sum(value > mark for value in survival[verified:])


def read_domains(path: Path = DEFAULTS) -> dict[str, tuple[RecordedRequest, ...]]:
    """Raises ConfigError naming the file and what is wrong with it."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read domains {path}: {error}") from error
    found = document.get("format") if isinstance(document, dict) else None
    if found != FORMAT:
        raise ConfigError(f"{path} must be an object with format {FORMAT!r}, got {found!r}")
    domains = document.get("domains")
    if not isinstance(domains, dict) or not domains:
        raise ConfigError(f"{path}: domains must be a non-empty object")
    return {name: _read_requests(rows, f"{path}: domain {name!r}") for name, rows in domains.items()}


def _read_requests(rows: Sequence[Mapping[str, Any]], where: str) -> tuple[RecordedRequest, ...]:
    try:
        requests = tuple(
            RecordedRequest(
                survival=_rows(one["survival"]),
                accepted=tuple(int(value) for value in one["accepted"]),
                looked_up=_rows(one["looked_up"]),
                looked_up_accepted=tuple(int(value) for value in one["looked_up_accepted"]),
                by_token=True,
            )
            for one in rows
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error!r}") from error
    for one in requests:
        _check(one.survival, one.accepted, "survival", "accepted", where)
        _check(one.looked_up, one.looked_up_accepted, "looked_up", "looked_up_accepted", where)
        if one.looked_up and len(one.looked_up) != len(one.survival):
            raise ConfigError(
                f"{where}: looked_up has {len(one.looked_up)} rows, survival {len(one.survival)}"
            )
    return requests


def _rows(value: Sequence[Sequence[float]]) -> tuple[tuple[float, ...], ...]:
    return tuple(tuple(float(one) for one in row) for row in value)


def _check(
    rows: Sequence[Sequence[float]], accepted: Sequence[int], of_rows: str, of_accepted: str, where: str
) -> None:
    if len(rows) != len(accepted):
        raise ConfigError(f"{where}: {of_rows} has {len(rows)} rows, {of_accepted} {len(accepted)}")
    if any(not 0 <= a <= len(row) for a, row in zip(accepted, rows, strict=True)):
        raise ConfigError(f"{where}: {of_accepted} must be in [0, draft length]")


def domains_document(
    domains: Mapping[str, Sequence[RecordedRequest]], source: Mapping[str, object]
) -> dict[str, object]:
    """JSON document of requests recorded by token; `read_domains` is the inverse up to rounding."""
    return {
        "format": FORMAT,
        "source": dict(source),
        "domains": {
            name: [
                {
                    "survival": [[round(value, 3) for value in row] for row in one.survival],
                    "accepted": list(one.accepted),
                    "looked_up": [[round(value, 2) for value in row] for row in one.looked_up],
                    "looked_up_accepted": list(one.looked_up_accepted),
                }
                for one in requests
            ]
            for name, requests in domains.items()
        },
    }
