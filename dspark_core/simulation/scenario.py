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


def _said(default: _T, text: str) -> _T:
    return field(default=default, metadata={HELP: text})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Defaults describe a small cluster of the demo model. Field descriptions double as flag help texts."""

    verifiers: int = _said(4, "verifiers of the cluster")
    drafters: int = _said(0, "shared by all verifiers; 0: each verifier has one of its own")
    network_rtt_seconds: float = _said(
        0.0005, "between a verifier and a drafter, both ways; 0: in one process"
    )
    max_running: int = _said(32, "requests that share a verifier's rounds")
    prefill_chunk_tokens: int = _said(256, "prompt tokens in one step, of all its requests")
    max_step_seconds: float = _said(
        0.0, "prompts beside running requests are paced so that a step takes about this long at most; 0: not"
    )
    cohorts: int = _said(
        1, "2: a verifier's requests take turns, one cohort drafted for while the other is verified"
    )
    requests: int = _said(1000, "simulated from the first arrival to the last end")
    users: int = _said(
        0,
        "closed loop: so many users of all verifiers together, each asking again when answered; 0: open "
        "arrivals, or 16 a verifier where none are asked for",
    )
    arrivals_per_second: float = _said(0.0, "open loop: Poisson arrivals at this rate")
    prompt_tokens: float = _said(64.0, "mean, geometric; cached prefixes count as absent")
    answer_tokens: float = _said(128.0, "mean, geometric")
    max_answer_tokens: int = _said(1024, "no answer is longer")
    fixed_lengths: bool = _said(False, "every prompt and answer is as long as the mean")
    domains: Mapping[str, float] = field(
        default_factory=dict,
        metadata={HELP: "shares of the traffic by domain (default: every recorded domain alike)"},
    )
    floor_share: float = _said(0.0, "share of the requests that are promised a speed")
    floor_tokens_per_second: float = _said(0.0, "that speed")
    coupled: bool = _said(
        False, "requests are verified by the coupled rule, or greedily: planning may then look ahead"
    )
    no_lookup: bool = _said(False, "nothing is looked up, as with `dspark up --no-lookup`")
    slow_verifiers: float = _said(0.0, "share of the verifiers that run at half speed")
    mtp1_accept: float = _said(
        0.0, "chance that an MTP-1 head's token stands; 0: as the first token of the recorded drafts"
    )
    round_overhead_seconds: float = _said(
        0.0, "per round, besides draft and target pass, on top of what the round times know of it"
    )
    mtp1_draft_share: float = _said(1.0, "time of an MTP-1 draft over that of a draft block")
    seed: int = _said(0, "the same figures for the same seed")

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
