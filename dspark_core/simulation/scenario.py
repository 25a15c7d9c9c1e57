"""Scenario of a simulation: pools, network, traffic, floors. Field names are those of `sim.yaml`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from dspark_core.errors import ConfigError
from dspark_core.records import MAX_COHORTS

_T = TypeVar("_T")

HELP = "help"
"""Metadata key of a field's one-line description."""


def _described(default: _T, text: str) -> _T:
    return field(default=default, metadata={HELP: text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Defaults describe a small cluster of the demo model. Field descriptions double as flag help texts."""

    verifiers: int = _described(4, "number of verifiers")
    drafters: int = _described(0, "number of drafters that all verifiers share; 0: one per verifier")
    network_rtt_seconds: float = _described(
        0.0005, "network round trip between verifier and drafter; 0: in one process"
    )
    max_running: int = _described(32, "most requests in a verifier's batch")
    prefill_chunk_tokens: int = _described(256, "prompt tokens per step, over all requests")
    max_step_seconds: float = _described(
        0.0, "pace prefill beside running requests so that a step takes at most about this long; 0: off"
    )
    cohorts: int = _described(
        1, "2: a verifier's requests take turns, one cohort drafting while the other is verified"
    )
    requests: int = _described(1000, "number of requests to simulate")
    users: int = _described(
        0,
        "closed loop: number of users, each asking again when answered; 0: open loop, or 16 users per "
        "verifier without an arrival rate",
    )
    arrivals_per_second: float = _described(0.0, "open loop: rate of Poisson arrivals")
    prompt_tokens: float = _described(64.0, "mean prompt length (geometric), without cached prefixes")
    answer_tokens: float = _described(128.0, "mean answer length (geometric)")
    max_answer_tokens: int = _described(1024, "longest answer")
    fixed_lengths: bool = _described(False, "give every prompt and answer the mean length")
    domains: Mapping[str, float] = field(
        default_factory=dict,
        metadata={HELP: "shares of the traffic by domain (default: equal shares of all recorded domains)"},
    )
    floor_share: float = _described(0.0, "share of requests with a speed floor")
    floor_tokens_per_second: float = _described(0.0, "the speed floor of these requests")
    coupled: bool = _described(
        False, "verify requests by the coupled rule or greedily, so that planning may look ahead"
    )
    no_lookup: bool = _described(False, "look nothing up, as with `dspark up --no-lookup`")
    slow_verifiers: float = _described(0.0, "share of verifiers that run at half speed")
    mtp1_accept: float = _described(
        0.0, "acceptance rate of an MTP-1 head's token; 0: that of the first recorded draft token"
    )
    round_overhead_seconds: float = _described(
        0.0, "overhead per round besides draft and target pass, in addition to that in the round times"
    )
    mtp1_draft_share: float = _described(1.0, "time of an MTP-1 draft relative to a draft block")
    seed: int = _described(0, "random seed; the same seed gives the same figures")

    def __post_init__(self) -> None:
        for name in ("verifiers", "max_running", "prefill_chunk_tokens", "requests", "max_answer_tokens"):
            _require(getattr(self, name) >= 1, name, getattr(self, name), ">= 1")
        for name in ("drafters", "users", "seed"):
            _require(getattr(self, name) >= 0, name, getattr(self, name), ">= 0")
        _require(self.cohorts in (1, MAX_COHORTS), "cohorts", self.cohorts, f"1 or {MAX_COHORTS}")
        for name in ("floor_share", "slow_verifiers", "mtp1_accept"):
            _require(0.0 <= getattr(self, name) <= 1.0, name, getattr(self, name), "in [0, 1]")
        for name in ("network_rtt_seconds", "round_overhead_seconds", "max_step_seconds"):
            _require(_finite(getattr(self, name)), name, getattr(self, name), ">= 0")
        for name in ("floor_tokens_per_second", "mtp1_draft_share", "arrivals_per_second"):
            _require(_finite(getattr(self, name)), name, getattr(self, name), ">= 0")
        for name in ("prompt_tokens", "answer_tokens"):
            _require(
                _finite(getattr(self, name)) and getattr(self, name) >= 1, name, getattr(self, name), ">= 1"
            )
        if bool(self.users) == bool(self.arrivals_per_second):
            raise ConfigError(
                f"exactly one of users and arrivals_per_second must be > 0, got {self.users} "
                f"and {self.arrivals_per_second:g}"
            )
        if bool(self.floor_share) != bool(self.floor_tokens_per_second):
            raise ConfigError(
                f"floor_share and floor_tokens_per_second go together, got {self.floor_share:g} "
                f"and {self.floor_tokens_per_second:g}"
            )
        for name, share in self.domains.items():
            _require(_finite(share), f"domains.{name}", share, ">= 0")
        if self.domains and sum(self.domains.values()) <= 0:
            raise ConfigError("domains must have a share > 0 among them")

    @classmethod
    def of(cls, values: Mapping[str, Any], *, beside: Sequence[str] = ()) -> Scenario:
        """From YAML values; `beside`: other keys of the file, for error messages. Raises ConfigError naming
        an unknown field or one of the wrong type."""
        known = {one.name: one for one in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"unknown scenario field {name!r}; known: {', '.join((*known, *beside))}")
            kind = known[name].type
            if kind == "int" and (not isinstance(value, int) or isinstance(value, bool)):
                raise ConfigError(f"{name} must be a whole number, got {value!r}")
            if kind == "bool" and not isinstance(value, bool):
                raise ConfigError(f"{name} must be true or false, got {value!r}")
            if kind == "float" and not _is_number(value):
                raise ConfigError(f"{name} must be a number, got {value!r}")
        domains = values.get("domains", {})
        if not isinstance(domains, Mapping) or not all(_is_number(share) for share in domains.values()):
            raise ConfigError(f"domains must map names to shares, got {domains!r}")
        return cls(**values)


def _require(condition: bool, name: str, value: object, rule: str) -> None:
    if not condition:
        raise ConfigError(f"{name} must be {rule}, got {value}")


def _finite(value: float) -> bool:
    return math.isfinite(value) and value >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
