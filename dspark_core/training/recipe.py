"""Drafter geometry and loss settings as values; reading them from files is left to the caller."""

from __future__ import annotations

from dataclasses import dataclass

from dspark_core.errors import ConfigError
from dspark_core.models.config import MarkovHeadType
from dspark_core.models.moe_config import MoeConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterRecipe:
    """Geometry of a new drafter. An algorithm reads the fields that apply to it."""

    algorithm: str
    """A name of `objectives.registry`."""
    target_layer_ids: tuple[int, ...]
    """Tapped target layers, as in the feature shards; -1 is the embedding output."""
    num_layers: int | None = None
    """None: one per source layer, or the algorithm's default."""
    source_layers: tuple[int, ...] = ()
    """Target layer each draft layer starts as a copy of; empty: random layers."""
    block_size: int = 7
    mask_token_id: int = 0
    markov_rank: int = 64
    """0: no Markov head."""
    markov_head_type: MarkovHeadType = MarkovHeadType.VANILLA
    confidence_head: bool = True
    context_window: int | None = None
    draft_vocab_size: int | None = None
    moe: MoeConfig | None = None
    """Experts instead of the draft layers' dense MLPs (dspark and dflash only)."""

    def __post_init__(self) -> None:
        for name in ("num_layers", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, got {value}")
        if self.source_layers and self.num_layers not in (None, len(self.source_layers)):
            raise ConfigError(
                f"source_layers must name num_layers={self.num_layers} layers, got {list(self.source_layers)}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LossConfig:
    """How positions are sampled and weighted, and the weights of the losses."""

    anchors_per_sequence: int = 48
    loss_decay: float = 4.0
    """Block positions over which the weight decays to 1/e: w_k = exp(-(k-1)/loss_decay)."""
    cross_entropy_weight: float = 0.1
    distance_weight: float = 0.9
    confidence_weight: float = 1.0
    tap_dropout: float = 0.0
    """Dropout of the target's hidden states, for data that is repeated over many epochs."""
    hidden_dropout: float = 0.0
    """Dropout of the drafter's final hidden states."""
    sample_below: float = 0.0
    """Positions with weight w_k below this are sampled with probability w_k / sample_below and then weighted
    sample_below: the same expected loss with less work on positions that hardly count. 0: every position."""
    slice_anchors: int = 64
    """Blocks whose vocabulary-sized tensors exist at a time."""

    def __post_init__(self) -> None:
        for name in ("anchors_per_sequence", "slice_anchors"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.loss_decay <= 0:
            raise ConfigError(f"loss_decay must be > 0, got {self.loss_decay}")
        for name in ("tap_dropout", "hidden_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ConfigError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if not 0 <= self.sample_below <= 1:
            raise ConfigError(f"sample_below must be in [0, 1], got {self.sample_below}")
        weights = (self.cross_entropy_weight, self.distance_weight, self.confidence_weight)
        if min(weights) < 0 or max(weights) == 0:
            raise ConfigError(f"loss weights must be >= 0 and not all zero, got {weights}")
