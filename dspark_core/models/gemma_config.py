"""What Gemma decoders have beyond Llama's: two kinds of layers, more norms, soft-capped logits.

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
    """What may differ between the attention layers of one decoder."""

    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rope_factor: float = 1.0
    """Every frequency is divided by it (`rope_type: linear`, and Gemma 4's `proportional`)."""
    rotated_fraction: float = 1.0
    """Share of the head that RoPE turns, the fast frequencies first; the rest has no position."""
    window: int | None = None
    """Positions a token sees, its own included; None: all before it."""
    values_are_keys: bool = False
    """There is no value projection: values are the keys before their norm and RoPE."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GemmaConfig:
    """Beside a `DecoderConfig`, whose own geometry is that of the full-attention layers."""

    layer_types: tuple[LayerType, ...]
    sliding: AttentionKind
    full: AttentionKind
    attention_scale: float
    """What scores are multiplied by before the softmax."""
    shifted_norms: bool = False
    """Norm weights are stored less one (Gemma 3)."""
    value_norm: bool = False
    """RMSNorm without weights over each head of v (Gemma 4)."""
    layer_scalar: bool = False
    """Each layer's output is multiplied by a number of its own (Gemma 4)."""
    final_logit_softcap: float | None = None
    """c tanh(logits / c)"""
    num_kv_shared_layers: int = 0
    """Last layers that attend to the keys and values of the last layer of their type before them."""
    wide_shared_mlp: bool = False
    """The MLPs of those layers are twice as wide."""
    per_layer_input_size: int = 0
    """Values per token and layer that a second embedding table feeds into the layers; 0: none."""
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
        """Layers with keys and values of their own; the others come after them."""
        return len(self.layer_types) - self.num_kv_shared_layers

    def kind(self, layer: int) -> AttentionKind:
        return self.sliding if self.layer_types[layer] is LayerType.SLIDING else self.full

    def kv_source(self, layer: int) -> int:
        """The layer whose keys and values `layer` attends to: itself, unless it shares."""
        if layer < self.num_own_layers:
            return layer
        wanted = self.layer_types[layer]
        return max(i for i in range(self.num_own_layers) if self.layer_types[i] is wanted)
