"""How RoPE is stretched past the positions a model was first trained on. Values only: `layers` computes
the frequencies, `rope_layouts` and `gguf` read them from files.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from dspark_core.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """Llama-3 frequency scaling (`rope_type: llama3`).

    Its name is part of what names the geometry of stored features.
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
    """Every frequency divided by the factor (`rope_type: linear`)."""

    factor: float
    original_max_positions: int
    """Has no part in the frequencies: it says how far the scaled ones reach."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN (`rope_type: yarn`): fast frequencies stay, slow ones are divided by the factor, those between
    are mixed, and the rotation lengthens what it turns."""

    factor: float
    original_max_positions: int
    attention_factor: float
    """What cosines and sines are multiplied by."""
    beta_fast: float = 32.0
    """Turns within the original positions from which on a frequency stays."""
    beta_slow: float = 1.0
    """Turns up to which it is divided."""
    truncate: bool = True
    """Whether the bounds of the mixed frequencies are widened to whole ones."""

    def __post_init__(self) -> None:
        _check_factor(self.factor)
        if self.beta_fast < self.beta_slow:
            raise ConfigError(f"beta_fast must be at least beta_slow={self.beta_slow}, got {self.beta_fast}")

    def mixed_range(self, head_dim: int, theta: float) -> tuple[float, float]:
        """Bounds of the mixed frequencies, by their index."""
        low = self._index_of(self.beta_fast, head_dim, theta)
        high = self._index_of(self.beta_slow, head_dim, theta)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        return max(low, 0), min(high, head_dim - 1)

    def _index_of(self, turns: float, head_dim: int, theta: float) -> float:
        """Of the frequency that turns so often within the original positions."""
        wavelength = self.original_max_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(theta))


AnyRopeScaling = RopeScaling | LinearScaling | YarnScaling


def yarn_attention_factor(factor: float, mscale: float = 1.0, mscale_all_dim: float | None = None) -> float:
    """What YaRN's authors found to keep attention as sharp as it was, over what `mscale_all_dim` undoes."""
    over = 1.0 if mscale_all_dim is None else 0.1 * mscale_all_dim * math.log(factor) + 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) / over


def reach(scaling: AnyRopeScaling | None, max_positions: int) -> int:
    """Positions of a context, where the file says `max_positions`. Files that `linear` or `yarn` stretch may
    still say what they had before, as model cards leave it: the factor counts, as in vLLM."""
    if isinstance(scaling, LinearScaling | YarnScaling):
        return int(scaling.factor * scaling.original_max_positions)
    return max_positions


def _check_factor(factor: float) -> None:
    if factor < 1.0:
        raise ConfigError(f"the factor of RoPE scaling must be at least 1, got {factor}")
