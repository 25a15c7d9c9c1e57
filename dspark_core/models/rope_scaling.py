"""RoPE scaling beyond the positions a model was originally trained on. Values only: `layers` computes
the frequencies, `rope_layouts` and `gguf` read them from files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dspark_core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama-3 frequency scaling (`rope_type: llama3`).

    Its class name is part of the identity of stored features' geometry.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        if self.high_freq_factor <= self.low_freq_factor:
            raise ConfigError(
                f"high_freq_factor must be above low_freq_factor={self.low_freq_factor}, "
                f"got {self.high_freq_factor}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Divides every frequency by the factor (`rope_type: linear`)."""

    factor: float
    original_max_positions: int
    """Does not affect the frequencies, only how far the scaled ones reach."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (`rope_type: yarn`): fast frequencies are kept, slow ones divided by the factor, those in
    between interpolated, and rotated vectors scaled by `attention_factor`."""

    factor: float
    original_max_positions: int
    attention_factor: float
    """Factor applied to cosines and sines."""
    beta_fast: float = 32.0
    """Frequencies with at least this many turns within the original positions are kept."""
    beta_slow: float = 1.0
    """Frequencies with at most this many turns are divided by the factor."""
    truncate: bool = True
    """Whether the bounds of the interpolated range are widened to whole indices."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if self.beta_fast < self.beta_slow:
            raise ConfigError(f"beta_fast must be at least beta_slow={self.beta_slow}, got {self.beta_fast}")

    def mixed_range(self, head_dim: int, theta: float) -> tuple[float, float]:
        """Bounds of the interpolated frequencies, by index."""
        low = self._index_of(self.beta_fast, head_dim, theta)
        high = self._index_of(self.beta_slow, head_dim, theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, head_dim - 1)

    def _index_of(self, turns: float, head_dim: int, theta: float) -> float:
        """Index of the frequency that makes `turns` turns within the original positions."""
        wavelength = self.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))


AnyRopeScaling = RopeScaling | LinearScaling | YarnScaling


def yarn_attention_factor(factor: float, mscale: float = 1.0, mscale_all_dim: float | None = None) -> float:
    """YaRN's attention temperature for `mscale`, divided by that for `mscale_all_dim` if given."""
    over = 1.0 if mscale_all_dim is None else 0.1 * mscale_all_dim * math.log(factor) + 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) / over


def reach(scaling: AnyRopeScaling | None, max_positions: int) -> int:
    """Maximum context length, where the file states `max_positions`. Files with `linear` or `yarn` scaling
    may still state the original length, as model cards suggest; then the factor decides, as in vLLM."""
    if isinstance(scaling, LinearScaling | YarnScaling):
        return int(scaling.factor * scaling.original_max_positions)
    return max_positions


def _check_factor(factor: float) -> None:
    if factor < 1.0:
        raise ConfigError(f"the factor of RoPE scaling must be at least 1, got {factor}")
