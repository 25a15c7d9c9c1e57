"""Configuration of Gemma decoders beyond Llama's: two kinds of layers, more norms, soft-capped logits.

Values only; `gemma_hf` reads and writes them under Hugging Face's names.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from dspark_core.errors import ConfigError


class LayerType(Enum):
    SLIDING = "sliding_attention"
    FULL = "full_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKind:
    """Properties that may differ between the attention layers of one decoder."""

    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_factor: float = 1.0
    """Divisor of every frequency (`rope_type: linear`, and Gemma 4's `proportional`)."""
    rotated_fraction: float = 1.0
    """Share of the head that RoPE rotates, fast frequencies first; the rest carries no position."""
    window: int | None = None
    """Positions a token attends to, including its own; None: all preceding."""
    values_are_keys: bool = False
    """No value projection: values are the keys before norm and RoPE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig:
    """Complements a `DecoderConfig`, whose own geometry is that of the full-attention layers."""

    layer_types: tuple[LayerType, ...]
    sliding: AttentionKind
    full: AttentionKind
    attention_scale: float
    """Factor applied to scores before the softmax."""
    shifted_norms: bool = False
    """Norm weights are stored minus one (Gemma 3)."""
    value_norm: bool = False
    """RMSNorm without weights over each head of v (Gemma 4)."""
    layer_scalar: bool = False
    """Each layer's output is multiplied by its own scalar (Gemma 4)."""
    final_logit_softcap: float | None = None
    """c tanh(logits / c)"""
    num_kv_shared_layers: int = 0
    """Number of last layers that attend to the keys and values of the last earlier layer of their type."""
    wide_shared_mlp: bool = False
    """The MLPs of those layers are twice as wide."""
    per_layer_input_size: int = 0
    """Elements per token and layer from a second embedding table; 0: none."""
    per_layer_vocab_size: int = 0

    def __post_init__(self) -> None:
        own = self.layer_types[: self.num_own_layers]
        if not 0 <= self.num_kv_shared_layers < max(len(self.layer_types), 1):
            raise ConfigError(
                f"num_kv_shared_layers must be in [0, {len(self.layer_types)}), "
                f"got {self.num_kv_shared_layers}"
            )
        lacking = [kind.value for kind in self.layer_types if kind not in own]
        if lacking:
            raise ConfigError(
                f"num_kv_shared_layers={self.num_kv_shared_layers} leaves no {lacking[0]} layer to share from"
            )
        if self.sliding.window is None or self.full.window is not None:
            raise ConfigError("sliding_window must be set, for sliding_attention layers only")

    @property
    def num_own_layers(self) -> int:
        """Number of layers with their own keys and values; those that share come after them."""
        return len(self.layer_types) - self.num_kv_shared_layers

    def kind(self, layer: int) -> AttentionKind:
        return self.sliding if self.layer_types[layer] is LayerType.SLIDING else self.full

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values `layer` attends to: itself, unless it shares them."""
        if layer < self.num_own_layers:
            return layer
        wanted = self.layer_types[layer]
        return max(i for i in range(self.num_own_layers) if self.layer_types[i] is wanted)
