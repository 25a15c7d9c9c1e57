"""What is simulated: pools, network, traffic, promises. Validated here, named as in `sim.yaml`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from dspark_core.errors import ConfigError
from dspark_core.records import MAX_COHORTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Defaults describe a small cluster of the demo model."""

    verifiers: int = 4
    drafters: int = 0
    """Shared by all verifiers; 0: each verifier has one of its own."""
    network_rtt_seconds: float = 0.0005
    """Between a verifier and a drafter, both ways; 0 in one process."""
    max_running: int = 32
    """Requests that share a verifier's rounds."""
    prefill_chunk_tokens: int = 256
    max_step_seconds: float = 0.0
    """Prompts beside running requests are paced so that a step takes about this long at most; 0: not."""
    cohorts: int = 1
    """2: a verifier's requests take turns in two cohorts, one drafted for while the other is verified."""
    requests: int = 1000
    """Simulated from the first arrival to the last end."""
    users: int = 0
    """Closed loop: so many users, each asking again when answered. 0: open arrivals."""
    arrivals_per_second: float = 0.0
    """Open loop: Poisson arrivals at this rate."""
    prompt_tokens: float = 64.0
    """Mean; geometric. Cached prefixes count as absent."""
    answer_tokens: float = 128.0
    """Mean; geometric, at most `max_answer_tokens`."""
    max_answer_tokens: int = 1024
    fixed_lengths: bool = False
    """Every prompt and answer is as long as the mean."""
    domains: Mapping[str, float] = field(default_factory=dict)
    """Shares of the traffic by domain; empty: every recorded domain alike."""
    floor_share: float = 0.0
    """Share of the requests that are promised `floor_tokens_per_second`."""
    floor_tokens_per_second: float = 0.0
    coupled: bool = False
    """Requests are verified by the coupled rule, or greedily: planning may then look ahead."""
    no_lookup: bool = False
    """Nothing is looked up, as with `dspark up --no-lookup`."""
    slow_verifiers: float = 0.0
    """Share of the verifiers that run at half speed."""
    mtp1_accept: float = 0.0
    """Chance that an MTP-1 head's token stands; 0: as the first token of the recorded drafts."""
    round_overhead_seconds: float = 0.0
    """Per round, besides draft and target pass, on top of what the round times know of it."""
    mtp1_draft_share: float = 1.0
    """Time of an MTP-1 draft over that of a draft block."""
    seed: int = 0

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
    def of(cls, values: Mapping[str, Any]) -> Scenario:
        """From YAML. Raises ConfigError naming an unknown field or one of the wrong kind."""
        known = {one.name: one for one in dataclasses.fields(cls)}
        for name, value in values.items():
            if name not in known:
                raise ConfigError(f"unknown scenario field {name!r}; known: {', '.join(known)}")
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
