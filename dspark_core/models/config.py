"""Geometry of target decoders and drafters, read from `config.json` fields or GGUF metadata."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from dspark_core.errors import ConfigError
from dspark_core.models.gemma_config import AttentionKind, GemmaConfig, LayerType
from dspark_core.models.moe_config import MoeConfig
from dspark_core.models.rope_scaling import AnyRopeScaling


class Family(Enum):
    """Decoder families. They differ in fields of `DecoderConfig`, not in classes."""

    LLAMA = "llama"
    QWEN3 = "qwen3"
    GEMMA3 = "gemma3"
    GEMMA4 = "gemma4"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """A pre-norm decoder with grouped-query attention, RoPE and a gated MLP."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_context_tokens: int
    rope_scaling: AnyRopeScaling | None = None
    tie_word_embeddings: bool = False
    qk_norm: bool = False
    """RMSNorm over each head of q and k before RoPE (Qwen3)."""
    attention_bias: bool = False
    gemma: GemmaConfig | None = field(default=None, repr=False)
    """None: not a Gemma model. Excluded from `repr`, which identifies the geometry of stored features."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"num_heads must be a multiple of num_kv_heads, got {self.num_heads} and {self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even, got {self.head_dim}")
        if self.gemma is not None:
            self._check_gemma(self.gemma)

    @property
    def embedding_scale(self) -> float:
        """Factor applied to token embeddings."""
        return 1.0 if self.gemma is None else self.hidden_size**0.5

    @property
    def final_logit_softcap(self) -> float | None:
        """c of `c tanh(logits / c)`; None: logits are not capped."""
        return None if self.gemma is None else self.gemma.final_logit_softcap

    @property
    def num_cached_layers(self) -> int:
        """Number of leading layers that have their own keys and values."""
        return self.num_layers if self.gemma is None else self.gemma.num_own_layers

    @property
    def kv_values_per_token(self) -> int:
        """Number of key and value elements per position, over all layers."""
        kinds = [self.attention_kind(layer) for layer in range(self.num_cached_layers)]
        return sum(2 * kind.num_kv_heads * kind.head_dim for kind in kinds)

    def attention_kind(self, layer: int) -> AttentionKind:
        if self.gemma is not None:
            return self.gemma.kind(layer)
        return AttentionKind(
            num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, rope_theta=self.rope_theta
        )

    def _check_gemma(self, gemma: GemmaConfig) -> None:
        if len(gemma.layer_types) != self.num_layers:
            raise ConfigError(
                f"layer_types must name num_layers={self.num_layers} layers, got {len(gemma.layer_types)}"
            )
        full = gemma.full
        own = (self.num_kv_heads, self.head_dim, self.rope_theta)
        if own != (full.num_kv_heads, full.head_dim, full.rope_theta):
            raise ConfigError(f"num_kv_heads, head_dim and rope_theta {own} must be those of full attention")
        for kind in (gemma.sliding, gemma.full):
            if self.num_heads % kind.num_kv_heads:
                raise ConfigError(
                    f"num_heads must be a multiple of num_kv_heads, "
                    f"got {self.num_heads} and {kind.num_kv_heads}"
                )
            if kind.head_dim % 2:
                raise ConfigError(f"head_dim must be even, got {kind.head_dim}")


def draft_backbone(target: DecoderConfig, num_layers: int) -> DecoderConfig:
    """The target's configuration with `num_layers` layers, for a drafter.

    For Gemma these are full-attention layers with their own keys and values and no per-layer
    inputs, as in DeepSpec; the drafter's own window limits their reach.
    """
    gemma = target.gemma
    if gemma is not None:
        gemma = replace(
            gemma,
            layer_types=(LayerType.FULL,) * num_layers,
            num_kv_shared_layers=0,
            wide_shared_mlp=False,
            per_layer_input_size=0,
            per_layer_vocab_size=0,
        )
    return replace(target, num_layers=num_layers, gemma=gemma)


class MarkovHeadType(Enum):
    VANILLA = "vanilla"
    GATED = "gated"
    RNN = "rnn"


@dataclass(frozen=True, slots=True, kw_only=True)
class DrafterConfig:
    """A DSpark drafter (DFlash: `markov_rank == 0`, no confidence head), as DeepSpec writes it.

    Fields beyond DeepSpec's: `context_window`, `draft_vocab_size` and the expert layers.
    """

    backbone: DecoderConfig
    """The drafter's own layers: `num_layers` of the target's kind."""
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    """Layers whose outputs are the context features; -1 is the embedding output."""
    block_size: int
    """Gamma: draft tokens per block."""
    mask_token_id: int
    markov_rank: int = 0
    markov_head_type: MarkovHeadType = MarkovHeadType.VANILLA
    confidence_head: bool = False
    confidence_head_with_markov: bool = False
    context_window: int | None = None
    """Context positions before the anchor that a block attends to; None: all of them."""
    draft_vocab_size: int | None = None
    """Size of the reduced draft vocabulary; None: the target's."""
    moe: MoeConfig | None = None
    """Expert layers that replace every dense MLP; None: dense."""

    @property
    def tap_size(self) -> int:
        """Elements per token of the concatenated target hidden states."""
        return len(self.target_layer_ids) * self.backbone.hidden_size

    @property
    def output_size(self) -> int:
        """Size of the vocabulary the drafter predicts over."""
        return self.backbone.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3Config:
    """An Eagle3 drafter as DeepSpec writes it: one layer that drafts autoregressively."""

    backbone: DecoderConfig
    """The drafter's own layer, of the target's kind."""
    num_target_layers: int
    target_layer_ids: tuple[int, ...]
    """Layers whose outputs are the context features; -1 is the embedding output."""
    block_size: int
    """Draft tokens per block: DeepSpec's `ttt_length`, the number of steps used in training."""
    draft_vocab_size: int | None = None
    """Size of the reduced draft vocabulary; None: the target's."""

    @property
    def tap_size(self) -> int:
        """Elements per token of the concatenated target hidden states."""
        return len(self.target_layer_ids) * self.backbone.hidden_size

    @property
    def output_size(self) -> int:
        """Size of the vocabulary the drafter predicts over."""
        return self.backbone.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size


@dataclass(frozen=True, slots=True, kw_only=True)
class MtpConfig:
    """DeepSeek-V3's multi-token prediction with a single module: one layer that drafts one token."""

    backbone: DecoderConfig
    """The module's own layer, of the target's kind."""
    num_target_layers: int
    draft_vocab_size: int | None = None
    """Size of the reduced draft vocabulary; None: the target's."""

    @property
    def target_layer_ids(self) -> tuple[int, ...]:
        """A single tap: the target's final hidden state, after its final norm."""
        return (self.num_target_layers,)

    @property
    def block_size(self) -> int:
        """Draft tokens per block."""
        return 1

    @property
    def output_size(self) -> int:
        """Size of the vocabulary the drafter predicts over."""
        return self.backbone.vocab_size if self.draft_vocab_size is None else self.draft_vocab_size


AutoregressiveConfig = Eagle3Config | MtpConfig
AnyDrafterConfig = DrafterConfig | Eagle3Config | MtpConfig
