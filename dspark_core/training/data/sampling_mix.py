"""Sampling parameters per prompt: a mixture of temperatures, determined by the prompt's id."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dspark_core.errors import ConfigError, InvalidRequestError
from dspark_core.records import MAX_SEED, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingMix:
    """Answers at several temperatures train a drafter for all of them."""

    temperatures: tuple[tuple[float, float], ...]
    """(temperature, share); shares sum to one."""
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        try:
            for temperature, _ in self.temperatures:
                SamplingParams(temperature=temperature, top_p=self.top_p, top_k=self.top_k, seed=self.seed)
        except InvalidRequestError as error:
            raise ConfigError(str(error)) from error

    def sampling_of(self, key: str) -> SamplingParams:
        """Depends only on the mixture and the key, not on the order of calls."""
        return SamplingParams(
            temperature=self._temperature(key),
            top_p=self.top_p,
            top_k=self.top_k,
            seed=_draw(self.seed, "noise", key),
        )

    def _temperature(self, key: str) -> float:
        point = _draw(self.seed, "temperature", key) / MAX_SEED
        for temperature, share in self.temperatures:
            point -= share
            if point < 0:
                return temperature
        return self.temperatures[-1][0]


def parse_temperatures(text: str) -> tuple[tuple[float, float], ...]:
    """`0:0.6,0.2:0.3,0.7:0.1` or one temperature; shares are scaled to sum to one.

    Raises ConfigError naming the part that is wrong.
    """
    found = []
    for part in text.split(","):
        temperature, _, share = part.partition(":")
        try:
            found.append((float(temperature), float(share) if share else 1.0))
        except ValueError:
            raise ConfigError(
                f"--temperatures must be like 0:0.6,0.2:0.3,0.7:0.1, got {part!r} in {text!r}"
            ) from None
        if not 0 < found[-1][1] < float("inf"):
            raise ConfigError(f"--temperatures: shares must be > 0, got {part!r} in {text!r}")
    total = sum(share for _, share in found)
    return tuple((temperature, share / total) for temperature, share in found)


def _draw(seed: int, purpose: str, key: str) -> int:
    """Pseudo-random integer in [0, MAX_SEED)."""
    digest = hashlib.sha256(f"{seed}/{purpose}/{key}".encode()).digest()
    return int.from_bytes(digest[:8]) % MAX_SEED
