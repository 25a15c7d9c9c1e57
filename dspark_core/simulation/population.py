"""The requests of a simulation, drawn once from the seed, so that every planner gets the same ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dspark_core.errors import ConfigError
from dspark_core.simulation.domains import DomainRounds
from dspark_core.simulation.scenario import Scenario

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Population:
    """One entry per request, in order of arrival."""

    arrival: Floats
    """Open loop only: seconds from the start."""
    prompt_tokens: Ints
    answer_tokens: Ints
    floor: Floats
    """Tokens per second; 0: none."""
    first_row: Ints
    """First recorded row of the request that it follows."""
    rows: Ints
    """Number of recorded rows of that request; they are followed cyclically."""
    by_token: Bools
    """Rows are one token apart, rather than one round."""
    phase: Ints
    """Row within the cycle where it begins."""
    domain: Ints


def draw_population(scenario: Scenario, recorded: DomainRounds) -> Population:
    """Raises ConfigError when the scenario names a domain that was not recorded."""
    # A random stream per quantity, so that changing one leaves the others unchanged.
    streams = np.random.default_rng(scenario.seed).spawn(6)
    count = scenario.requests
    followed = _followed(scenario, recorded, streams[0])
    floors = streams[1].random(count) < scenario.floor_share
    arrival = np.zeros(count)
    if scenario.arrivals_per_second:
        arrival = np.cumsum(streams[2].exponential(1.0 / scenario.arrivals_per_second, count))
    answers = _lengths(scenario, scenario.answer_tokens, streams[3])
    return Population(
        arrival=arrival,
        prompt_tokens=_lengths(scenario, scenario.prompt_tokens, streams[4]),
        answer_tokens=np.minimum(answers, scenario.max_answer_tokens),
        floor=np.where(floors, scenario.floor_tokens_per_second, 0.0),
        first_row=recorded.request_start[followed],
        rows=recorded.request_rows[followed],
        by_token=recorded.request_by_token[followed],
        phase=streams[5].integers(0, recorded.request_rows[followed]),
        domain=recorded.request_domain[followed],
    )


def _lengths(scenario: Scenario, mean: float, rng: np.random.Generator) -> Ints:
    if scenario.fixed_lengths:
        return np.full(scenario.requests, round(mean), dtype=np.int64)
    return rng.geometric(1.0 / mean, scenario.requests)


def _followed(scenario: Scenario, recorded: DomainRounds, rng: np.random.Generator) -> Ints:
    """Recorded request each one follows, drawn by domain share and, within a domain, by number of rows."""
    shares = dict(scenario.domains) or dict.fromkeys(recorded.names, 1.0)
    unknown = sorted(set(shares) - set(recorded.names))
    if unknown:
        raise ConfigError(f"domain {unknown[0]!r} is not recorded; there are: {', '.join(recorded.names)}")
    weights = np.zeros(len(recorded.request_domain))
    for index, name in enumerate(recorded.names):
        members = recorded.request_domain == index
        rows = recorded.request_rows[members]
        weights[members] = shares.get(name, 0.0) * rows / rows.sum()
    return rng.choice(len(weights), size=scenario.requests, p=weights / weights.sum())
